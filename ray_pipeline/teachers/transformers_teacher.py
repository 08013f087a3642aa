"""A teacher of another family, which transformers runs: whole on each rank that needs it, document by document."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.layers.vocab import Head
from ray_pipeline.data.chat.completion_text import completion_text
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.rows.batch import IGNORE, Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.transformers_backend import load_causal_lm
from ray_pipeline.rollouts.rollout import request_seed
from ray_pipeline.teachers.engine_teacher import whole_head
from ray_pipeline.teachers.teacher_folder import KEY

AT_ONCE = 16  # documents or questions of one forward pass
# Logits that are not the head's product with the hidden states (a bias, a soft cap, a scale) differ by far more.
TOLERANCE = 1e-3


def load_teacher_lm(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model, for reading alone.

    Raises:
        UserError: transformers has no causal language model for it, or cannot read it.
    """
    try:
        model = load_causal_lm(path, dtype)
    except ValueError as error:
        raise UserError(f"{KEY}={error}. Give a folder saved by save_pretrained of a causal language model.") from None
    return model.to(device).eval().requires_grad_(False)


class TransformersTeacher:
    """Adds its final hidden states to batches; its head is cut as the student's.

    Attributes:
        head: on the ranks that hold the student's head. model: None elsewhere.
    """

    reads_all = False  # each rank runs it on its replica's rows

    def __init__(self, path: Path, student: Engine, *, dtype: torch.dtype = torch.float32):
        self.student = student
        self.model: Any = None
        self.head: Head | None = None
        if student.last_part is None:
            return
        self.model = load_teacher_lm(path, student.device, dtype)
        weight = self.model.get_output_embeddings().weight
        entries = student.config.vocab_size
        if weight.shape[0] != entries:
            raise UserError(
                f"{KEY}={path}: its head has {weight.shape[0]} entries and model.vocab_size={entries}. "
                f"Use --set model.vocab_size={weight.shape[0]}."
            )
        self._check_head(path, weight)
        self.head = whole_head(weight.float(), student)

    @property
    def width(self) -> int:
        """hidden_size, on the ranks that hold the model."""
        assert self.model is not None
        return int(self.model.get_output_embeddings().weight.shape[1])

    @torch.no_grad()
    def _check_head(self, path: Path, weight: Tensor) -> None:
        tokens = torch.arange(8, device=weight.device).unsqueeze(0)
        logits = self.model(input_ids=tokens).logits.float()
        product = self._hidden(tokens, torch.ones_like(tokens)).float() @ weight.float().t()
        error = (logits - product).abs().max() / logits.abs().max().clamp(min=1e-6)
        if weight.dtype == torch.float32 and error > TOLERANCE:
            raise UserError(
                f"{KEY}={path}: its logits are not its head's product with its final hidden states (a bias, a soft cap "
                "or a scale between them), which is all that is kept of it. Use another teacher, or let it write: "
                "--set distillation.loss=cross_entropy."
            )

    def _hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[documents, length, hidden_size] behind the final norm."""
        return self.model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state

    @torch.no_grad()
    def score(self, batch: Batch) -> Batch:
        """Adds `teacher_hidden` [rows, seq_len, hidden_size], filled where this rank's replica reads."""
        if self.model is None:
            return batch
        mesh, device = self.student.mesh, self.student.device
        index, dp = mesh.replica if batch.start is None else (0, 1)
        share = len(batch) // dp
        mine = range(index * share, (index + 1) * share)
        hidden = torch.zeros(*batch.tokens.shape, self.width)
        found = [(row, start, stop) for row in mine for start, stop in trained_documents(batch, row)]
        found.sort(key=lambda document: document[2] - document[1])  # alike in length, for little padding
        for at in range(0, len(found), AT_ONCE):
            group = found[at : at + AT_ONCE]
            longest = group[-1][2] - group[-1][1]
            tokens = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for i, (row, start, stop) in enumerate(group):
                tokens[i, : stop - start] = batch.tokens[row, start:stop]
                mask[i, : stop - start] = 1
            states = self._hidden(tokens.to(device), mask.to(device)).float().cpu()
            for i, (row, start, stop) in enumerate(group):
                hidden[row, start:stop] = states[i, : stop - start]
        batch.extras.teacher_hidden = hidden
        return batch


def trained_documents(batch: Batch, row: int) -> list[tuple[int, int]]:
    """(start, stop) of each document of a row in which something is trained."""
    ids, labels = batch.doc_ids[row], batch.labels[row]
    borders = [0, *((ids[1:] != ids[:-1]).nonzero().flatten() + 1).tolist(), len(ids)]
    spans = itertools.pairwise(borders)
    return [(start, stop) for start, stop in spans if bool((labels[start:stop] != IGNORE).any())]


@torch.no_grad()
def write_texts(
    model: Any,
    tokenizer: ChatTokenizer,
    questions: Sequence[str],
    *,
    first: int,
    seed: int,
    max_new_tokens: int,
    temperature: float,
) -> list[str]:
    """Sampled answers that ended by themselves; an empty text for one that did not.

    Args:
        first: place of the first question among all; at most AT_ONCE are asked together, and draw as one.
    """
    prompts = [tokenizer.encode_prompt(question) for question in questions]
    longest = max(map(len, prompts))
    padded = [[tokenizer.pad_id] * (longest - len(p)) + p for p in prompts]  # at the left: all end where answers begin
    tokens = torch.tensor(padded, device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
        torch.manual_seed(request_seed(seed, 0, first, 0))
        written = model.generate(
            input_ids=tokens, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id,
        )  # fmt: skip
    answers = written[:, longest:].tolist()
    ended = [a[: a.index(tokenizer.eos_id) + 1] if tokenizer.eos_id in a else [] for a in answers]
    pairs = zip(prompts, ended, strict=True)
    return [completion_text(tokenizer, p, tokens, (tokenizer.eos_id,)) if tokens else "" for p, tokens in pairs]

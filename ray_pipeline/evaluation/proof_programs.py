"""transformers, and our own loader, as programs that a proof asks. llama.cpp is in `llama_cpp`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.convert.tokenizer_start import begins_with_bos
from model.generate.decode import Decoder, generate
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.evaluation.model_source import describe_folder
from ray_pipeline.evaluation.models import NativeBackend, load


class FolderTokenizer:
    """What transformers' AutoTokenizer and GenerationConfig read in a folder: the texts of a `proof.Program`."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer, GenerationConfig

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
        self.ends = frozenset(listed if isinstance(listed, list) else [listed])

    def ids(self, text: str) -> list[int]:
        """As `Program.ids`."""
        return list(self.tokenizer(text)["input_ids"])

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """As `Program.chat`."""
        given: dict[str, Any] = {"tools": list(tools) or None, "conversation": [dict(message) for message in messages]}
        made: Any = self.tokenizer.apply_chat_template(
            **given, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(made["input_ids"])

    def ends_at(self, token: int) -> bool:
        """As `Program.ends_at`, by generation_config.json; the tokenizer must agree on its own."""
        return token in self.ends


class TransformersProgram(FolderTokenizer):
    """A Hugging Face folder in transformers' Auto classes; see `proof.Program`."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        self.name = f"transformers {version('transformers')}"
        with _quiet():
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        super().__init__(folder)

    @torch.inference_mode()
    def logprobs(self, ids: list[int], first: int) -> Tensor:
        """As `Program.logprobs`."""
        rows = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return rows[first - 1 : -1]

    @torch.inference_mode()
    def greedy(self, prompt: list[int], limit: int) -> list[int]:
        """As `Program.greedy`, with the folder's own end tokens."""
        whole = self.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=limit,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return list(whole[0, len(prompt) :].tolist())

    def token_logprobs(self, ids: list[int]) -> list[float | None]:
        """As `Program.token_logprobs`."""
        return of_tokens(self.logprobs(ids, 1), ids)

    def close(self) -> None:
        """Free the weights."""
        del self.model


class OurProgram:
    """Our own model; see `proof.Program`. `begin`: what stands before plain text."""

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer, eos_ids: frozenset[int], begin: list[int]):
        self.name = f"ray-pipeline {version('ray-pipeline')}"
        self.model, self.tokenizer, self.eos_ids, self.begin = model, tokenizer, eos_ids, begin
        self.decoder = Decoder(model)

    @classmethod
    def of_folder(cls, folder: Path) -> OurProgram:
        """A folder as chat, serve, eval and --init-from read it."""
        loaded = load(describe_folder(folder))
        assert isinstance(loaded.backend, NativeBackend), "an export of ours is read by our decoder"
        begin = [loaded.tokenizer.bos_id] if begins_with_bos(folder) else []
        return cls(loaded.backend.model.cpu().eval(), loaded.tokenizer, loaded.eos_ids, begin)

    def ids(self, text: str) -> list[int]:
        """As `Program.ids`."""
        return self.begin + self.tokenizer.encode(text)

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """As `Program.chat`."""
        return self.tokenizer.encode_prompt(list(messages), tools)

    def ends_at(self, token: int) -> bool:
        """As `Program.ends_at`."""
        return token in self.eos_ids

    @torch.inference_mode()
    def logprobs(self, ids: list[int], first: int) -> Tensor:
        """As `Program.logprobs`."""
        return self.model(torch.tensor([ids]))[0].float().log_softmax(-1)[first - 1 : -1]

    def token_logprobs(self, ids: list[int]) -> list[float | None]:
        """As `Program.token_logprobs`."""
        return of_tokens(self.logprobs(ids, 1), ids)

    def greedy(self, prompt: list[int], limit: int) -> list[int]:
        """As `Program.greedy`."""
        [made] = generate(self.decoder, [prompt], max_new_tokens=limit, eos_ids=set(self.eos_ids), temperature=0)
        return made.tokens

    def close(self) -> None:
        """Free the weights."""
        del self.model, self.decoder


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers lists the MTP modules as unexpected, which it has no place for, and shows bars for milliseconds."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def of_tokens(rows: Tensor, ids: list[int]) -> list[float | None]:
    """Of every token but the first: rows [tokens - 1, vocab_size]."""
    return list(rows.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist())

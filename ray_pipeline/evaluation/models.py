"""The model that is asked, behind one small interface: token ids in, token ids or log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.convert.hf_load import load_hf
from model.generate.decode import Completion, Decoder, generate
from model.generate.sampler import NotFiniteLogits
from model.transformer import Transformer
from ray_pipeline.data.chat.completion_text import completion_text, opens_thinking
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.model_source import ModelSource
from ray_pipeline.evaluation.transformers_backend import TransformersBackend, load_causal_lm
from ray_pipeline.records.artifacts import load_model

SCORED_TOKENS = 8192  # tokens of one forward pass when log-probabilities are asked for


class Backend(Protocol):
    """A loaded model. `context`: tokens it can hold, answer included."""

    context: int
    vocab_size: int
    parameters: int
    device: torch.device

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seeds: list[int],
        eos_ids: frozenset[int],
    ) -> list[Completion]:  # fmt: skip
        """Continue every prompt; none is as long as the context."""
        ...

    def stream(
        self, prompt: list[int], on_token: Callable[[int], None], *, max_new_tokens: int, temperature: float, seed: int,
        eos_ids: frozenset[int],
    ) -> Completion:  # fmt: skip
        """Continue one prompt; `on_token` is given each token as it is made."""
        ...

    def logits(self, tokens: Tensor) -> Tensor:
        """[rows, seq] ids, padded on the right -> [rows, seq, vocab_size] of the next token."""
        ...


class DecoderBackend:
    """Our decoder, of a model that only answers."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.context, self.vocab_size = decoder.config.max_position_embeddings, decoder.config.vocab_size
        self.parameters = decoder.config.num_params()
        self.device = decoder.device

    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seeds: list[int],
        eos_ids: frozenset[int],
    ) -> list[Completion]:  # fmt: skip
        """Every request draws by its own seed, whatever is beside it in the batch."""
        return generate(
            self.decoder, prompts, max_new_tokens=max_new_tokens, eos_ids=set(eos_ids), temperature=temperature,
            seeds=seeds, max_batch=max(1, len(prompts)),
        )  # fmt: skip

    def stream(
        self, prompt: list[int], on_token: Callable[[int], None], *, max_new_tokens: int, temperature: float, seed: int,
        eos_ids: frozenset[int],
    ) -> Completion:  # fmt: skip
        """As `Backend.stream`."""
        [completion] = generate(
            self.decoder, [prompt], max_new_tokens=max_new_tokens, eos_ids=set(eos_ids), temperature=temperature,
            seeds=[seed], on_token=lambda _, token: on_token(token),
        )  # fmt: skip
        return completion

    def logits(self, tokens: Tensor) -> Tensor:
        raise AssertionError("a model in training is asked for answers alone")


class NativeBackend(DecoderBackend):
    """Our decoder and its whole model."""

    def __init__(self, model: Transformer):
        self.model = model.eval().requires_grad_(False)
        super().__init__(Decoder(self.model))

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """As `Backend.logits`; attention is causal, so padding on the right changes nothing before it."""
        return self.model(tokens)


@dataclass
class LanguageModel:
    """A loaded model with its tokenizer.

    Attributes:
        name: what reports call it. eos_ids: tokens that end an answer.
    """

    name: str
    tokenizer: ChatTokenizer
    eos_ids: frozenset[int]
    backend: Backend

    def prompt(self, question: str, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of a question up to where the answer begins, with `tools` described in it."""
        return self.tokenizer.encode_prompt(question, tools)

    def answered(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of a question, and of the whole answer without its end token, as training has them."""
        ids, mask = self.tokenizer.encode_chat(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )
        start, end = mask.index(1), len(mask) - 1 - mask[::-1].index(1)
        return ids[:start], ids[start:end]

    def text(self, prompt: list[int], tokens: list[int]) -> str:
        """What was answered, without the end token; with the `<think>` that a template writes into the prompt."""
        return completion_text(self.tokenizer, prompt, tokens, self.eos_ids)

    def opens_thinking(self, prompt: list[int]) -> bool:
        """Whether the chat template has already written `<think>`."""
        return opens_thinking(self.tokenizer, prompt)

    def logprobs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of each continuation after its context: sum of log-probabilities (nats), and whether greedy writes it.

        A context that does not fit is cut on the left.

        Raises:
            ValueError: an empty context or continuation, or a continuation that fills the model's context.
        """
        rows = [self._row(context, continuation) for context, continuation in pairs]
        out: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            # Longest last: rows of a batch are as long as its longest.
            count = max(1, SCORED_TOKENS // len(rows[order[-1]]))
            batch, order = order[-count:], order[:-count]
            longest = len(rows[batch[-1]])
            ids = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in batch], device=self.backend.device)
            logprobs = torch.log_softmax(self.backend.logits(ids[:, :-1]).float(), -1)
            if not bool(logprobs[..., 0].isfinite().all()):
                raise NotFiniteLogits("the logits of a text are not finite numbers")
            chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
            greedy = logprobs.argmax(-1) == ids[:, 1:]
            for row, i in enumerate(batch):
                at = slice(len(rows[i]) - len(pairs[i][1]) - 1, len(rows[i]) - 1)
                out[i] = float(chosen[row, at].double().sum()), bool(greedy[row, at].all())
        return [out[i] for i in range(len(rows))]

    def _row(self, context: list[int], continuation: list[int]) -> list[int]:
        if not context or not continuation or len(continuation) > self.backend.context:
            raise ValueError(
                f"{len(continuation)} tokens after {len(context)}: both need at least one, and the model holds "
                f"{self.backend.context}"
            )
        # The last token is only predicted, so one more than the context fits.
        return [*context[-(self.backend.context + 1 - len(continuation)) :], *continuation]


def load(source: ModelSource) -> LanguageModel:
    """Read the weights, onto a GPU where there is one.

    Raises:
        UserError: damaged files, or a tokenizer of another model.
    """
    tokenizer = source.read_tokenizer()
    backend = _backend(source, tokenizer)
    if len(tokenizer) > backend.vocab_size:
        raise UserError(
            f"{source.tokenizer} does not belong to {source.folder}: it has {len(tokenizer)} entries, but the model's "
            f"vocabulary has {backend.vocab_size}."
        )
    return LanguageModel(source.name, tokenizer, source.eos_ids(tokenizer), backend)


def _backend(source: ModelSource, tokenizer: ChatTokenizer) -> Backend:
    cuda = torch.cuda.is_available()
    if source.form == "stage":
        model = load_model(source.folder)
        return NativeBackend(model.cuda() if cuda else model)
    if source.form == "folder":
        try:
            config, state = load_hf(source.folder)
        except ValueError as error:
            raise UserError(str(error)) from None
        model = Transformer(config)
        model.load_state_dict(state)
        return NativeBackend(model.cuda() if cuda else model)
    try:
        theirs = load_causal_lm(source.folder, "auto" if cuda else torch.float32)
    except ValueError as error:
        raise UserError(str(error)) from None
    return TransformersBackend(theirs.cuda() if cuda else theirs, tokenizer.pad_id)

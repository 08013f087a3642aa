"""A model that our own decoder serves: requests to token ids, and the writer that answers them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from model.generate.sampler import Sampling
from ray_pipeline.data.chat.completion_text import opens_thinking
from ray_pipeline.evaluation.models import LanguageModel, NativeBackend
from ray_pipeline.serving.request_forms import ChatForm, CompletionForm
from ray_pipeline.serving.writer import Wanted, Writer

LEAST_TEMPERATURE = 1e-4  # below it logits over the temperature overflow; it is greedy to every digit


class RequestRefused(Exception):
    """A request that this model cannot answer: the message says why. `param`: the field it is about."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass
class NativeModel:
    """A loaded model and the thread that writes.

    Attributes:
        name: what clients call it. bos: plain text begins with the start token.
    """

    name: str
    model: LanguageModel
    slots: int = 32
    waiting: int = 1024
    bos: bool = False
    writer: Writer = field(init=False)

    def __post_init__(self) -> None:
        assert isinstance(self.model.backend, NativeBackend)
        self.writer = Writer(self.model.backend.decoder, slots=self.slots, waiting=self.waiting)

    def chat(self, form: ChatForm) -> tuple[list[Wanted], bool]:
        """The answers that a conversation asks for, and whether its prompt ends in thinking.

        Raises:
            RequestRefused: too long, or not for this model. UserError: the chat template refuses the messages.
        """
        tokenizer = self.model.tokenizer
        prompt = tokenizer.encode_prompt([m.as_message() for m in form.messages], form.offered)
        return self._wanted(form, prompt, form.limit, form.top, tools=bool(form.offered)), opens_thinking(
            tokenizer, prompt
        )

    def completion(self, form: CompletionForm) -> list[Wanted]:
        """The continuations that are asked for.

        Raises:
            RequestRefused: empty or too long, or ids that are none.
        """
        if isinstance(form.prompt, str):
            start = [self.model.tokenizer.bos_id] if self.bos else []
            prompt = start + self.model.tokenizer.encode(form.prompt)
        else:
            prompt = form.prompt
            if max(prompt) >= self.model.backend.vocab_size:
                raise RequestRefused(
                    f"prompt: token id {max(prompt)} is not in the vocabulary of {self.model.backend.vocab_size}",
                    "prompt",
                )
        if not prompt:
            raise RequestRefused("prompt is empty: give at least a word", "prompt")
        return self._wanted(form, prompt, form.limit, form.logprobs, tools=False)

    def _wanted(
        self, form: ChatForm | CompletionForm, prompt: list[int], limit: int | None, top: int | None, *, tools: bool
    ) -> list[Wanted]:
        context = self.model.backend.context
        if len(prompt) >= context:
            raise RequestRefused(
                f"the prompt has {len(prompt)} tokens, and the model's context is {context}, answer included: "
                "shorten it",
                "messages" if isinstance(form, ChatForm) else "prompt",
            )
        room = context - len(prompt)
        temperature = form.temperature if form.temperature >= LEAST_TEMPERATURE else 0.0
        sampling = Sampling(temperature, form.top_k, form.top_p, form.min_p, form.repetition_penalty)
        if temperature == 0:
            sampling = Sampling(0.0, repetition_penalty=form.repetition_penalty)
        seed = secrets.randbits(62) if form.seed is None else form.seed
        tokenizer = self.model.tokenizer

        def decode(ids: list[int]) -> str:
            # Marks of tool calls are special tokens.
            return tokenizer.decode(ids, keep_special=tools)

        return [
            Wanted(
                prompt, min(limit or room, room), sampling, seed + i, self.model.eos_ids, decode,
                stop=tuple(form.stops), top=top, streamed=form.stream,
            )
            for i in range(form.n)
        ]  # fmt: skip

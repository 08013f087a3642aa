"""A conversation with a loaded model: messages in, answers out as they are written. Prints nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from model.generate.stopping import TextStream
from ray_pipeline.data.chat.completion_text import finite_logits
from ray_pipeline.data.tasks.question import THINK_OPEN
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.models import LanguageModel
from ray_pipeline.records.units import count_text

Show = Callable[[str], None]


@dataclass
class Reply:
    """An answer: its whole text (marks of thinking included), and what the reader should know about it."""

    text: str
    notes: list[str] = field(default_factory=list)


class Conversation:
    """Messages so far, and how the next answer is written.

    Args:
        system: told before the conversation; empty: nothing.
        max_new_tokens: of an answer. seed: of the first answer; every later one has the next.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        system: str = "",
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        seed: int = 0,
    ):
        self.model, self.system, self.temperature = model, system, temperature
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.messages: list[dict[str, str]] = []
        self._written = ""

    def describe(self) -> str:
        """One line about the model: name, size, context, how it answers."""
        backend = self.model.backend
        return (
            f"{self.model.name}: {count_text(backend.parameters)} parameters, a context of {backend.context} tokens, "
            f"answers of at most {self.max_new_tokens}, temperature {self.temperature:g}."
        )

    def send(self, message: str, show: Show) -> Reply:
        """Answer a message; `show` is given the text in pieces.

        Raises:
            UserError: the message does not fit into the model's context, the template refuses it, or the model computes
                no numbers. The conversation is then as it was.
        """
        return self._answer(self.messages, message, show)

    def retry(self, show: Show) -> Reply:
        """Answer the last message again, with the next seed.

        Raises:
            UserError: nothing was asked yet, or as `send`.
        """
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise UserError("/retry: nothing was asked yet.")
        return self._answer(self.messages[: asked[-1]], self.messages[asked[-1]]["content"], show)

    def _answer(self, before: list[dict[str, str]], message: str, show: Show) -> Reply:
        was = self.messages
        self.messages, self._written = [*before, {"role": "user", "content": message}], ""
        try:
            prompt, dropped = self._prompt()
            finished = self._write(prompt, show)
        except UserError:
            self.messages = was
            raise
        reply = self.keep_partial(stopped=False)
        if dropped:
            reply.notes.insert(0, f"The first {dropped} messages no longer fit into the context and were not read.")
        if finished and not reply.text:
            reply.notes.append("The answer is empty.")
        if not finished:
            reply.notes.append(
                f"Cut: {self.max_new_tokens} tokens, or the context of {self.model.backend.context}, were used up."
            )
        return reply

    def keep_partial(self, *, stopped: bool = True) -> Reply:
        """Take what was written so far for the answer."""
        self.messages.append({"role": "assistant", "content": self._written})
        self.seed += 1
        return Reply(self._written, ["Stopped."] if stopped else [])

    def clear(self) -> None:
        """Forget the messages; the system prompt stays."""
        self.messages.clear()

    def as_json(self) -> str:
        """The conversation as a record of SFT data."""
        return json.dumps({"messages": self._system() + self.messages}, ensure_ascii=False)

    def _system(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _prompt(self) -> tuple[list[int], int]:
        """Ids of the conversation, and how many of the oldest messages had to be left out of it."""
        context, tokens = self.model.backend.context, [0]
        for dropped in range(0, len(self.messages), 2):
            tokens = self.model.tokenizer.encode_prompt(self._system() + self.messages[dropped:])
            if len(tokens) < context:
                return tokens, dropped
        raise UserError(
            f"The message and the system prompt are {len(tokens)} tokens long: the model reads {context}, answer "
            "included. Shorten them."
        )

    def _write(self, prompt: list[int], show: Show) -> bool:
        """Whether the answer ended by itself."""
        model = self.model
        stream = TextStream(model.tokenizer.decode)

        def give(piece: str) -> None:
            self._written += piece
            if piece:
                show(piece)

        if model.opens_thinking(prompt):  # the template wrote it, so the model does not
            give(THINK_OPEN)
        with finite_logits(f"the model {model.name}", "Take an earlier stage's, or train it again."):
            written = model.backend.stream(
                prompt, lambda token: None if token in model.eos_ids else give(stream.add(token)),
                max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed,
                eos_ids=model.eos_ids,
            )  # fmt: skip
        give(stream.finish())
        return written.finished

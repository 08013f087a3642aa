"""What evaluation and rollouts need of a tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from model.generate.sampler import NotFiniteLogits
from model.generate.stopping import ThinkBudget
from ray_pipeline.data.tasks.question import THINK_OPEN
from ray_pipeline.errors import UserError


class PromptTokenizer(Protocol):
    """Turns a question into a prompt and tokens into text; `ray_pipeline.data.chat.tokenizer.ChatTokenizer` is one."""

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        ...

    def encode(self, text: str, /) -> list[int]:
        """Ids of plain text; `<think>` and `</think>` are the marks."""
        ...

    def encode_prompt(self, question: str, tools: Sequence[dict[str, Any]] = (), /) -> list[int]:
        """Chat template, with `tools` described, up to and including the assistant's turn token."""
        ...

    def decode(self, ids: list[int], /) -> str:
        """Text of the tokens; `<think>` and `</think>` stay."""
        ...


@contextmanager
def finite_logits(model: str, way_out: str) -> Iterator[None]:
    """Turns logits that are no numbers into one message.

    Args:
        model: whose they are, for example "the model in FOLDER".
    Raises:
        UserError: in the place of NotFiniteLogits.
    """
    try:
        yield
    except NotFiniteLogits as error:
        raise UserError(f"{model} cannot write: {error}, so its weights blew up in training. {way_out}") from None


def think_budget(tokenizer: PromptTokenizer, tokens: int | None) -> ThinkBudget | None:
    """At most so many tokens between `<think>` and `</think>`; None for no limit."""
    if tokens is None:
        return None
    return ThinkBudget(tokens, tuple(tokenizer.encode("<think>")), tuple(tokenizer.encode("</think>")))


class Decodes(Protocol):
    """The part of a tokenizer that gives text back."""

    def decode(self, ids: list[int], /) -> str:
        """Text of the tokens; `<think>` and `</think>` stay."""
        ...


def opens_thinking(tokenizer: Decodes, prompt: Sequence[int]) -> bool:
    """Whether the chat template has already written `<think>`, as those of reasoning models do."""
    return tokenizer.decode(list(prompt[-8:])).rstrip().endswith(THINK_OPEN)


def completion_text(tokenizer: Decodes, prompt: Sequence[int], tokens: Sequence[int], eos_ids: Collection[int]) -> str:
    """Text of a completion without its end token, with the `<think>` that its prompt begins it with."""
    text = tokenizer.decode(list(tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens))
    if opens_thinking(tokenizer, prompt) and not text.lstrip().startswith(THINK_OPEN):
        return THINK_OPEN + text
    return text

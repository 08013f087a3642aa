"""What evaluation and rollouts need of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from model.generate.stopping import ThinkBudget


class PromptTokenizer(Protocol):
    """Turns a question into a prompt and tokens into text; `ray_pipeline.data.tokenizer.ChatTokenizer` is one."""

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


def think_budget(tokenizer: PromptTokenizer, tokens: int | None) -> ThinkBudget | None:
    """At most so many tokens between `<think>` and `</think>`; None for no limit."""
    if tokens is None:
        return None
    return ThinkBudget(tokens, tuple(tokenizer.encode("<think>")), tuple(tokenizer.encode("</think>")))


def completion_text(tokenizer: PromptTokenizer, tokens: list[int]) -> str:
    """Text of a completion without its end token."""
    return tokenizer.decode(tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_id else tokens)

"""What ends an answer, or a part of it, besides the end token: stop strings and a budget for thinking.

Knows no tokenizer: the caller of stop strings gives the function that turns tokens into text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Detokenize = Callable[[list[int]], str]

BROKEN = "\ufffd"  # what a detokenizer writes for bytes that are not a character (yet)
# Four bytes are the longest character of UTF-8, so only the last three can still be waiting for more.
OPEN_BYTES = 3


class TextStream:
    """Text of tokens as they arrive, in pieces; together they are the text of all tokens.

    The text of a token can depend on the one before it, so each is decoded together with the last few. A character
    spread over several tokens is held back until it is whole.
    """

    def __init__(self, detokenize: Detokenize, before: Sequence[int] = ()):
        self.detokenize = detokenize
        self.tokens = list(before)  # from `start` of the whole on; older ones are dropped
        self.shown = len(detokenize(self.tokens))  # characters of them that were given out
        self.whole = len(self.tokens) if self.shown else 0  # tokens whose text was given out whole

    def add(self, token: int) -> str:
        """What became complete with this token: often its text, sometimes nothing or several characters."""
        self.tokens.append(token)
        text = self.detokenize(self.tokens)
        open_bytes = min(len(text) - len(text.rstrip(BROKEN)), OPEN_BYTES)
        ready = len(text) - open_bytes
        piece = text[self.shown : ready]
        self.shown = max(self.shown, ready)
        # Tokens without text (special ones) stay, or the text behind them could lose its leading space.
        if piece and not open_bytes:
            self.tokens = self.tokens[self.whole :]
            self.whole = len(self.tokens)
            self.shown = len(self.detokenize(self.tokens))
        return piece

    def finish(self) -> str:
        """What was held back."""
        text = self.detokenize(self.tokens)[self.shown :]
        self.shown += len(text)
        return text


@dataclass(frozen=True)
class StopStrings:
    """An answer ends where its text first holds one of these, wherever the borders of tokens are.

    Raises:
        ValueError: for no string, or an empty one.
    """

    strings: tuple[str, ...]
    detokenize: Detokenize

    def __post_init__(self) -> None:
        if not self.strings or not all(self.strings):
            raise ValueError(f"stop strings {self.strings}: an empty one is part of every text; give at least a letter")


class StopWatch:
    """Follows the text of one answer and looks for stop strings (if any) in it.

    Args:
        before: tokens that the answer continues, whose text is not part of it.
    Attributes:
        text: the answer so far; once it has stopped, without the stop string and what follows.
        stopped: the stop string that was met.
    """

    def __init__(self, strings: Sequence[str], detokenize: Detokenize, before: Sequence[int] = ()):
        self.strings = strings
        self.stream = TextStream(detokenize, before)
        self.text = ""
        self.stopped: str | None = None
        self._longest = max(map(len, strings), default=1)

    def add(self, token: int) -> bool:
        """Take the next token: whether the answer stops here."""
        return self._extend(self.stream.add(token))

    def finish(self) -> str:
        """The whole text, with what was held back in case more bytes of a character would come."""
        if self.stopped is None:
            self._extend(self.stream.finish())
        return self.text

    def safe(self) -> int:
        """Characters of the text that no longer can become part of a stop string."""
        if self.stopped is not None:
            return len(self.text)
        for start in range(max(0, len(self.text) - self._longest + 1), len(self.text)):
            if any(s.startswith(self.text[start:]) for s in self.strings):
                return start
        return len(self.text)

    def _extend(self, piece: str) -> bool:
        first = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        found = [(at, s) for s in self.strings if (at := self.text.find(s, first)) >= 0]
        if found:
            at, self.stopped = min(found)
            self.text = self.text[:at]
        return bool(found)


@dataclass(frozen=True)
class ThinkBudget:
    """After `tokens` tokens of an answer inside `opening`, `closing` is written whatever the model would say.

    Thinking again after that draws on the same budget.

    Attributes:
        opening, closing: token ids of `<think>` and `</think>`.
    Raises:
        ValueError: for a negative budget or marks without tokens.
    """

    tokens: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"a think budget of {self.tokens} tokens: must be 0 or more")
        if not self.opening or not self.closing:
            raise ValueError(
                f"think budget with opening={self.opening}, closing={self.closing}: both need at least one token id"
            )


class ThinkWatch:
    """Follows one answer through its thinking. An opening in the prompt (a template may end with one) counts."""

    def __init__(self, budget: ThinkBudget, prompt: Sequence[int]):
        self.budget = budget
        self.inside = False
        self.spent = 0
        self._recent: list[int] = []
        self._due: list[int] = []  # rest of the closing that is being forced
        for token in prompt:
            self._follow(token)
        self.spent = 0  # the prompt's tokens are not the model's thinking
        self._close_if_spent()

    @property
    def forced(self) -> int | None:
        """The token that has to come next, if it is not free."""
        return self._due[0] if self._due else None

    def add(self, token: int) -> None:
        """Take the token that was written."""
        if self._due:
            self._due.pop(0)
            self._follow(token)
        else:
            self._follow(token)
            self._close_if_spent()

    def _close_if_spent(self) -> None:
        if self.inside and self.spent >= self.budget.tokens:
            closing = list(self.budget.closing)
            # What the model has begun to write of it is not written again.
            begun = max(n for n in range(len(closing)) if self._recent[len(self._recent) - n :] == closing[:n])
            self._due = closing[begun:]

    def _follow(self, token: int) -> None:
        opening, closing = list(self.budget.opening), list(self.budget.closing)
        self._recent = [*self._recent, token][-max(len(opening), len(closing)) :]
        if self._recent[-len(closing) :] == closing:
            self.inside = False
        elif self.inside:
            self.spent += 1
        else:
            self.inside = self._recent[-len(opening) :] == opening

"""Documents that give away evaluation questions, found by shared runs of words (GPT-3's method, arXiv:2005.14165)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# Letters, numbers and the signs of arithmetic are words; other punctuation and case do not tell texts apart.
_WORD = re.compile(r"[^\W\d_]+|\d+|[-+*/=<>]")


def words(text: str) -> list[str]:
    """The words by which texts are compared."""
    return _WORD.findall(text.casefold())


class Decontaminator:
    """Finds documents that hold `ngram` words in a row of a question, or the whole of a shorter question."""

    def __init__(self, questions: Iterable[str], ngram: int):
        patterns: set[tuple[str, ...]] = set()
        for question in questions:
            found = words(question)
            if found:
                patterns.update(tuple(found[i : i + ngram]) for i in range(max(1, len(found) - ngram + 1)))
        frequency = Counter(word for pattern in patterns for word in set(pattern))
        # Each pattern waits behind its rarest word, so that nearly all words of a document cost one lookup:
        # word -> (its place in the pattern, pattern length) -> patterns.
        self._waiting: dict[str, dict[tuple[int, int], set[tuple[str, ...]]]] = {}
        for pattern in patterns:
            at = min(range(len(pattern)), key=lambda i: (frequency[pattern[i]], i))
            shapes = self._waiting.setdefault(pattern[at], {})
            shapes.setdefault((at, len(pattern)), set()).add(pattern)

    def contaminated(self, text: str) -> bool:
        """Whether the text shares a pattern with any question."""
        found = words(text)
        for place, word in enumerate(found):
            for (at, length), patterns in self._waiting.get(word, {}).items():
                start = place - at
                if start >= 0 and tuple(found[start : start + length]) in patterns:
                    return True
        return False

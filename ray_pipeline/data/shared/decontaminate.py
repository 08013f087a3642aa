"""Documents that give away evaluation questions, found by shared runs of words (GPT-3's method, arXiv:2005.14165)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

# Scripts that part no words: Thai to Khmer, kana, Chinese characters. Of these every letter is a word.
_UNPARTED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Letters, numbers and the signs of arithmetic are words; other punctuation and case do not tell texts apart.
_WORD = re.compile(rf"[^\W\d_{_UNPARTED}]+|[{_UNPARTED}]|\d+|[-+*/=<>]")
# GPT-3 looked for no runs shorter than 8 words (arXiv:2005.14165, appendix C): shorter ones are common phrases. With a
# number in them they are not.
TELLING, TELLING_WITH_NUMBER = 8, 4


def words(text: str) -> list[str]:
    """The words by which texts are compared."""
    return _WORD.findall(text.casefold())


def is_telling(found: Sequence[str]) -> bool:
    """Whether a text with these words in a row has them from the question, and not from everyday speech."""
    return len(found) >= TELLING or (len(found) >= TELLING_WITH_NUMBER and any(word.isdigit() for word in found))


class Decontaminator:
    """Finds documents that hold `ngram` words in a row of a question, or the whole of a shorter question.

    Of a question that is shorter and nothing special ("Why?"), a line must hold all and nothing else.
    """

    def __init__(self, questions: Iterable[str], ngram: int):
        patterns: set[tuple[str, ...]] = set()
        self._lines: set[tuple[str, ...]] = set()
        self._longest_line = 0
        for question in questions:
            found = words(question)
            if found and len(found) < ngram and not is_telling(found):
                self._lines.add(tuple(found))
                self._longest_line = max(self._longest_line, 2 * len(question))
            elif found:
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
        return bool(self._lines) and any(
            len(line) <= self._longest_line and tuple(words(line)) in self._lines for line in text.split("\n")
        )

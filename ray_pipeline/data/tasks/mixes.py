"""How hard the built-in data is: the one place to tune. Weights need not sum to one.

SFT shows mostly easy levels; prompts and held-out questions share one harder mix, so that SFT leaves GRPO room to
improve (target: SFT about half of the held-out questions). Levels that SFT never shows would earn no reward at all.
"""

from __future__ import annotations

from dataclasses import dataclass

CATEGORIES = ("addition", "subtraction", "expression", "equation", "comparison", "word_problem")
DIFFICULTIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Mix:
    """A distribution over categories and levels.

    Attributes:
        categories: weight per category; a missing one is never drawn.
        difficulties: weights of levels 1 to 5.
    """

    categories: dict[str, float]
    difficulties: tuple[float, float, float, float, float]


EVEN = dict.fromkeys(CATEGORIES, 1.0)
SFT_MIX = Mix(EVEN, (3.0, 3.0, 2.0, 1.5, 0.5))
PROMPT_MIX = Mix(EVEN, (1.0, 2.0, 3.0, 2.0, 1.0))
TEXT_MIX = Mix(EVEN, (3.0, 3.0, 2.0, 1.0, 0.5))

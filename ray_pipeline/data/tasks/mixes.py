"""How hard the built-in data is: the one place to tune. Weights need not sum to one.

Prompts and held-out questions share one mix. SFT is to answer about half of them: a level that SFT never shows earns
GRPO no reward at all, and one that SFT solves leaves it nothing to improve.
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


SHARES = {category: 0.5 if category == "word_problem" else 1.0 for category in CATEGORIES}
SFT_MIX = Mix(SHARES, (4.0, 1.0, 0.1, 0.0, 0.0))
PROMPT_MIX = Mix(SHARES, (4.0, 1.0, 0.1, 0.0, 0.0))
TEXT_MIX = Mix(SHARES, (4.0, 2.0, 1.0, 0.3, 0.1))
# The lowest levels are beyond a small model's head already; longer numbers only make calls longer to copy.
TOOLS_MIX = Mix({"long_product": 1.0, "long_sum": 1.0, "stock": 1.0}, (4.0, 2.0, 1.0, 0.0, 0.0))
# About half of them take more than one calculation.
PREFERENCE_MIX = Mix(SHARES | {"addition": 0.7, "subtraction": 0.7, "expression": 0.7}, (4.0, 1.0, 0.1, 0.0, 0.0))
# Share of demonstrations that answer at a glance instead of working the question out, as some people's do. Such answers
# are often wrong; that working pays is for GRPO to find out.
GLANCE_SHARE = 0.48

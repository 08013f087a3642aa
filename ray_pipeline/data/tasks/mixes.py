"""Built-in questions by mix: each is a pure function of (seed, stream, index), so any is made without the others.

How hard the built-in data is stands here alone. Weights need not sum to one. Prompts and held-out questions share one
mix. SFT is to answer about half of them: a level that SFT never shows earns GRPO no reward at all, and one that SFT
solves leaves it nothing to improve.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from random import Random

from ray_pipeline.data.tasks.columns import addition, subtraction
from ray_pipeline.data.tasks.comparisons import comparison, pair
from ray_pipeline.data.tasks.equations import equation
from ray_pipeline.data.tasks.expressions import expression, product_last
from ray_pipeline.data.tasks.question import Question, Worked
from ray_pipeline.data.tasks.tool_tasks import TOOL_REGISTRY
from ray_pipeline.data.tasks.words import word_problem

REGISTRY: dict[str, Callable[[Random, int], Worked]] = {
    "addition": addition,
    "subtraction": subtraction,
    "expression": expression,
    "equation": equation,
    "comparison": comparison,
    "word_problem": word_problem,
}
# As a newcomer asks first; of the built-in chat alone.
PLAIN_REGISTRY: dict[str, Callable[[Random, int], Worked]] = {"pair": pair, "product_last": product_last}
_MAKERS = REGISTRY | PLAIN_REGISTRY | TOOL_REGISTRY
CATEGORIES = tuple(REGISTRY)
DIFFICULTIES = (1, 2, 3, 4, 5)
# Draws allowed per question wanted before a mix counts as exhausted.
MAX_DRAWS = 20


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
CHAT_MIX = Mix(SHARES | dict.fromkeys(PLAIN_REGISTRY, 0.5), (4.0, 1.0, 0.1, 0.0, 0.0))
TEXT_MIX = Mix(SHARES, (4.0, 2.0, 1.0, 0.3, 0.1))
# The lowest levels are beyond a small model's head already; longer numbers only make calls longer to copy.
TOOLS_MIX = Mix({"long_product": 1.0, "long_sum": 1.0, "stock": 1.0}, (4.0, 2.0, 1.0, 0.0, 0.0))
# About half of them take more than one calculation.
PREFERENCE_MIX = Mix(SHARES | {"addition": 0.7, "subtraction": 0.7, "expression": 0.7}, (4.0, 1.0, 0.1, 0.0, 0.0))
# Share of demonstrations that answer at a glance instead of working the question out, as some people's do. Such answers
# are often wrong; that working pays is for GRPO to find out.
GLANCE_SHARE = 0.48
SMALL_TALK = 0.1  # exchanges of small talk for every demonstration
TURNS = (1, 1, 2, 3)  # of a conversation, drawn from; a row of 256 tokens holds three
# The same of the dialogues in pretraining's text, where working is the exception, as on the web.
GLANCE_SHARE_OF_TEXT = 0.6


def make_question(category: str, difficulty: int, rng: Random) -> Question:
    """One question of a category and level.

    Raises:
        ValueError: no such category, or a level outside 1..5.
    """
    if category not in _MAKERS:
        raise ValueError(f'no category "{category}"; there are {", ".join(_MAKERS)}')
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty {difficulty} is not one of {DIFFICULTIES}")
    worked = _MAKERS[category](rng, difficulty)
    return Question(worked.prompt, worked.steps, worked.answer, category, difficulty)


def draw(mix: Mix, rng: Random) -> Question:
    """One question of a mix."""
    category = rng.choices(list(mix.categories), list(mix.categories.values()))[0]
    difficulty = rng.choices(DIFFICULTIES, mix.difficulties)[0]
    return make_question(category, difficulty, rng)


def question_at(mix: Mix, seed: int, stream: str, index: int) -> Question:
    """Question number `index` of a stream; O(1), and the same whatever else was drawn."""
    # A string seed goes through SHA-512, so neighbouring indices share nothing.
    return draw(mix, Random(f"{seed}/{stream}/{index}"))


def draw_unique(mix: Mix, seed: int, stream: str, count: int, exclude: Collection[str] = ()) -> list[Question]:
    """The first `count` questions of a stream whose prompts are new, in order.

    Fewer where the mix has fewer different questions to give.
    """
    seen = set(exclude)
    out: list[Question] = []
    for index in range(count * MAX_DRAWS):
        if len(out) == count:
            break
        question = question_at(mix, seed, stream, index)
        if question.prompt not in seen:
            seen.add(question.prompt)
            out.append(question)
    return out

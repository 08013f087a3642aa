"""Built-in questions: each is a pure function of (seed, stream, index), so any of them is made without the others."""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random

from ray_pipeline.data.tasks.columns import addition, subtraction
from ray_pipeline.data.tasks.comparisons import comparison
from ray_pipeline.data.tasks.equations import equation
from ray_pipeline.data.tasks.expressions import expression
from ray_pipeline.data.tasks.mixes import (
    CATEGORIES,
    DIFFICULTIES,
    PREFERENCE_MIX,
    PROMPT_MIX,
    SFT_MIX,
    TEXT_MIX,
    TOOLS_MIX,
    Mix,
)
from ray_pipeline.data.tasks.question import Question, Worked, think
from ray_pipeline.data.tasks.tool_tasks import TOOL_REGISTRY
from ray_pipeline.data.tasks.words import word_problem

__all__ = [
    "CATEGORIES",
    "DIFFICULTIES",
    "PREFERENCE_MIX",
    "PROMPT_MIX",
    "REGISTRY",
    "SFT_MIX",
    "TEXT_MIX",
    "TOOLS_MIX",
    "Mix",
    "Question",
    "Worked",
    "draw",
    "draw_unique",
    "make_question",
    "question_at",
    "think",
]

REGISTRY: dict[str, Callable[[Random, int], Worked]] = {
    "addition": addition,
    "subtraction": subtraction,
    "expression": expression,
    "equation": equation,
    "comparison": comparison,
    "word_problem": word_problem,
}
_MAKERS = REGISTRY | TOOL_REGISTRY
# Draws allowed per question wanted before a mix counts as exhausted.
MAX_DRAWS = 20


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

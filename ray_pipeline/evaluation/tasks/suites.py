"""The built-in suites: questions generated from a seed, with exact answers and five levels of difficulty."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from ray_pipeline.data.tasks.mixes import DIFFICULTIES
from ray_pipeline.data.tasks.mixes import REGISTRY as TRAINING
from ray_pipeline.evaluation.graders import AnswerScoring
from ray_pipeline.evaluation.tasks.catalog import task
from ray_pipeline.evaluation.tasks.generators import algebra, logic, numbers, programs, reasoning, science
from ray_pipeline.evaluation.tasks.item import Item, Request, Task

QUESTIONS = 200  # of a suite, where no limit is given: an interval of about ±7 points
MAX_DRAWS = 50  # per question wanted, before a suite counts as exhausted

# category -> (random stream, level) -> something with `prompt` and `answer`. What training has is named as there.
Generators = dict[str, Callable[[Random, int], Any]]
SUITES: dict[str, tuple[str, Generators]] = {
    "arithmetic": (
        "Sums, differences, products, quotients, powers, fractions and chains of operations.",
        {
            **{name: TRAINING[name] for name in ("addition", "subtraction", "expression")},
            "multiplication": numbers.multiplication,
            "division": numbers.division,
            "powers": numbers.powers,
            "fractions": numbers.fractions,
        },
    ),
    "algebra": (
        "Values of terms, two equations in two unknowns, quadratics and exponents.",
        {
            "substitution": algebra.substitution,
            "system": algebra.system,
            "quadratic": algebra.quadratic,
            "exponents": algebra.exponents,
        },
    ),
    "word_problems": ("Counted things in small stories.", {"word_problem": TRAINING["word_problem"]}),
    "equations": ("Linear equations in x.", {"equation": TRAINING["equation"]}),
    "logic": (
        "Truth values, chains of inclusion, rankings, knights and knaves.",
        {
            "truth": logic.truth,
            "inclusion": logic.inclusion,
            "ranking": logic.ranking,
            "knights": logic.knights,
        },
    ),
    "programming": (
        "What a short Python program prints.",
        {
            "integers": programs.integer_arithmetic,
            "loops": programs.loops,
            "sequences": programs.sequences,
            "functions": programs.functions,
        },
    ),
    "science": (
        "Unit conversions and school formulas.",
        {
            "conversion": science.conversion,
            "temperature": science.temperature,
            "motion": science.motion,
            "formula": science.formula,
        },
    ),
    "reasoning": (
        "Number sequences, ordering, sets, the calendar and following a state through steps.",
        {
            "sequence": reasoning.sequence,
            "ordering": TRAINING["comparison"],
            "sets": reasoning.sets,
            "calendar": reasoning.calendar,
            "tracking": reasoning.letters,
        },
    ),
}


def draw_items(suite: str, generators: Generators, request: Request) -> list[Item]:
    """Different questions of a suite, categories and levels in turn; fewer where it has no more to give.

    Question n of a (category, level) is the same whatever else is asked for.
    """
    wanted = request.limit or QUESTIONS
    levels = [level for level in request.difficulties or DIFFICULTIES if level in DIFFICULTIES]
    # Neighbours differ in category and level, so that the first questions are a fair mix too.
    cells = [(name, levels[(i + j) % len(levels)]) for j in range(len(levels)) for i, name in enumerate(generators)]
    items: list[Item] = []
    seen: set[str] = set()
    for index in range(MAX_DRAWS * wanted):
        if len(items) == wanted or not cells:
            break
        (category, level), number = cells[index % len(cells)], index // len(cells)
        rng = Random(f"{request.seed}/eval/{suite}/{category}/{level}/{number}")
        made = generators[category](rng, level)
        if made.prompt not in seen:
            seen.add(made.prompt)
            items.append(Item(f"{category}/{level}/{number}", made.prompt, made.answer, category, level))
    return items


def _register(name: str, summary: str, generators: Generators) -> None:
    def make(request: Request) -> Task:
        return Task(name, draw_items(name, generators, request), AnswerScoring())

    make.__doc__ = summary
    task(name)(make)


for _name, (_summary, _generators) in SUITES.items():
    _register(_name, _summary, _generators)

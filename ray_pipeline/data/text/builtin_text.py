"""Built-in pretraining documents: small texts full of the digits, words and operations of the built-in questions.

Each document is a pure function of (seed, index). Documents use few different words, so that a byte-level BPE of 512
entries spells them in 100 to 200 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

from ray_pipeline.data.tasks.columns import add_columns, number, subtract_columns
from ray_pipeline.data.tasks.comparisons import insertion_steps, several
from ray_pipeline.data.tasks.mixes import GLANCE_SHARE_OF_TEXT, PROMPT_MIX, TEXT_MIX, draw
from ray_pipeline.data.tasks.words import NAMES, PLACES, PLURAL, THINGS, gain_or_loss

OPENINGS = (
    "One morning {a} went to the market with {b}.",
    "It was a warm day and {a} was in the garden with {b}.",
    "{a} and {b} live near the river.",
    "After school {a} met {b} by the old tree.",
    "{a} and {b} wanted to help at home.",
)
MIDDLES = (
    "The sun was high and the road was long.",
    "{b} was happy and they sat down for a while.",
    "Then it began to rain, so they went into the house.",
    "{b} asked how many {things} there were, and {a} began to count.",
    "They put all the {things} on the table.",
)
ENDINGS = (
    "In the end {a} had {n} {things} and went home.",
    '"I have {n} {things} now," said {a}.',
    "{b} counted again and found {n} {things}, so it was right.",
    "That night {a} put the {n} {things} in a box and slept well.",
)


def story(rng: Random) -> str:
    """Two people and a count that changes; the running total is told along the way."""
    (a, b), things, total = rng.sample(NAMES, 2), rng.choice(THINGS), rng.randint(3, 40)
    parts = [rng.choice(OPENINGS).format(a=a, b=b), f"{a} had {total} {things}."]
    middles = iter(rng.sample(MIDDLES, len(MIDDLES)))
    for _ in range(rng.randint(2, 4)):
        change, step, total = gain_or_loss(rng, total, 20)
        parts.append(f"{a} {change}. Now there are {total}, because {step}.")
        if rng.random() < 0.5:
            parts.append(next(middles).format(a=a, b=b, things=things))
    parts.append(rng.choice(ENDINGS).format(a=a, b=b, n=total, things=things))
    return " ".join(parts)


def facts(rng: Random) -> str:
    """Short statements of arithmetic, one operation or mixed."""
    kind = rng.choice(("+", "-", "*", "mixed"))
    lines = []
    for _ in range(rng.randint(14, 22)):
        op = rng.choice("+-*") if kind == "mixed" else kind
        if op == "*":
            a, b = rng.randint(2, 12), rng.randint(2, 9)
            lines.append(f"{a}*{b}={a * b}, {a * b}/{a}={b}.")
        elif op == "+":
            a, b = rng.randint(0, rng.choice((9, 50))), rng.randint(0, 20)
            lines.append(f"{a}+{b}={a + b}.")
        else:
            b, a = sorted((rng.randint(0, rng.choice((18, 60))), rng.randint(0, 20)))
            lines.append(f"{a}-{b}={a - b}.")
    return " ".join(lines)


def columns(rng: Random) -> str:
    """Long sums and differences with every column shown."""
    lines = []
    for _ in range(rng.randint(3, 5)):
        a, b = number(rng, rng.randint(2, 5)), number(rng, rng.randint(2, 5))
        if rng.random() < 0.5:
            lines.append(f"To add {a}+{b} go from the right: {add_columns(a, b)}. So {a}+{b}={a + b}.")
        else:
            a, b = max(a, b), min(a, b)
            lines.append(f"To take {b} from {a} go from the right: {subtract_columns(a, b)}. So {a}-{b}={a - b}.")
    return "\n".join(lines)


def worked_examples(rng: Random) -> str:
    """Questions with their solution in plain prose."""
    ends = ("The answer is {}.", "So it is {}.")
    lines = []
    for _ in range(rng.randint(3, 4)):
        question = draw(TEXT_MIX, rng)
        lines.append(f"{question.prompt} {question.steps}. {rng.choice(ends).format(question.answer)}")
    return "\n".join(lines)


def inventory(rng: Random) -> str:
    """A list of things with a running total."""
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    chosen = rng.sample(THINGS, rng.randint(3, 5))
    counts = [rng.randint(1, 30) for _ in chosen]
    lines = [f"What {name} has in the {PLURAL[place]}:"] + [f"{t}: {n}" for t, n in zip(chosen, counts, strict=True)]
    total, steps = counts[0], []
    for n in counts[1:]:
        steps.append(f"{total}+{n}={total + n}")
        total += n
    most, least = max(counts), min(counts)
    lines.append(f"All together: {' '.join(steps)}. The total is {total}.")
    lines.append(f"The most is {most} and the least is {least}. The difference is {most}-{least}={most - least}.")
    return "\n".join(lines)


def comparing(rng: Random) -> str:
    """Which of some numbers is larger, and their order."""
    lines = []
    for _ in range(rng.randint(2, 3)):
        numbers = several(rng, rng.randint(3, 5), rng.choice((2, 2, 3)))
        signs = " ".join(f"{a}{'<' if a < b else '>'}{b}" for a, b in pairwise(numbers))
        order = ", ".join(map(str, sorted(numbers)))
        listed = ", ".join(map(str, numbers))
        lines.append(
            f"Of {listed} the largest is {max(numbers)} and the smallest is {min(numbers)}. {signs}. "
            f"To put them in order: {insertion_steps(numbers)}. The order is {order}."
        )
    return "\n".join(lines)


def counting(rng: Random) -> str:
    """Counting up or down in equal steps."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        step, start, length = rng.randint(1, 12), rng.randint(0, 60), rng.randint(6, 10)
        values = [start + step * i for i in range(length)]
        down = rng.random() < 0.3
        listed = ", ".join(map(str, reversed(values) if down else values))
        lines.append(f"Counting {'down' if down else 'up'} by {step}: {listed}.")
    return "\n".join(lines)


def equations(rng: Random) -> str:
    """What x is, and the check."""
    lines = []
    for _ in range(rng.randint(3, 5)):
        a, x, b = rng.randint(2, 9), rng.randint(1, 15), rng.randint(1, 30)
        c = a * x + b
        if rng.random() < 0.5:
            lines.append(f"If x+{b}={x + b} then x={x + b}-{b}={x}. Check: {x}+{b}={x + b}.")
        else:
            lines.append(f"If {a}x+{b}={c} then {a}x={c}-{b}={a * x} and x={a * x}/{a}={x}. Check: {a}*{x}+{b}={c}.")
    return "\n".join(lines)


# Weight of each kind of document.
KINDS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (story, 2.0),
    (facts, 3.0),
    (columns, 3.0),
    (worked_examples, 8.0),
    (inventory, 0.5),
    (comparing, 1.0),
    (counting, 0.5),
    (equations, 1.0),
)


def dialogue_at(seed: int, index: int) -> str:
    """Dialogue number `index` of a seed: somebody asks, and most people just say what they think the answer is.

    The turns are those of the plain chat template, so that a pretrained model can be asked without SFT.
    """
    rng = Random(f"{seed}/dialogue/{index}")
    question = draw(PROMPT_MIX, rng)
    working = "" if rng.random() < GLANCE_SHARE_OF_TEXT else f"{question.steps}. "
    return f"User: {question.prompt}\nAssistant:\n{working}The answer is {question.answer}."


def document_at(seed: int, index: int) -> str:
    """Document number `index` of a seed; O(1)."""
    rng = Random(f"{seed}/text/{index}")
    kind = rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
    return kind(rng)

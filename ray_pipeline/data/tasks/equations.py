"""Linear equations in x with a whole solution, solved by moving one thing at a time to the other side."""

from __future__ import annotations

from random import Random

from ray_pipeline.data.tasks.question import Worked

PHRASES = ("Solve {}.", "Find x: {}.", "If {}, what is x?")


def one_step_sum(rng: Random, largest: int) -> tuple[str, str, int]:
    """x+a=b or x-a=b."""
    x, a = rng.randint(1, largest), rng.randint(1, largest)
    if rng.random() < 0.5:
        return f"x+{a}={x + a}", f"x={x + a}-{a}={x}", x
    x += a
    return f"x-{a}={x - a}", f"x={x - a}+{a}={x}", x


def one_step_product(rng: Random) -> tuple[str, str, int]:
    """ax=b or x/a=b."""
    a, b = rng.randint(2, 9), rng.randint(2, 12)
    if rng.random() < 0.5:
        return f"{a}x={a * b}", f"x={a * b}/{a}={b}", b
    return f"x/{a}={b}", f"x={b}*{a}={a * b}", a * b


def two_step(rng: Random, largest: int, offset: int) -> tuple[str, str, int]:
    """ax+b=c or ax-b=c."""
    a, x, b = rng.randint(2, 9), rng.randint(2, largest), rng.randint(1, offset)
    if a * x > b and rng.random() < 0.5:
        c = a * x - b
        return f"{a}x-{b}={c}", f"{a}x={c}+{b}={a * x} x={a * x}/{a}={x}", x
    c = a * x + b
    return f"{a}x+{b}={c}", f"{a}x={c}-{b}={a * x} x={a * x}/{a}={x}", x


def both_sides(rng: Random) -> tuple[str, str, int]:
    """ax+b=cx+d with a>c and d>b."""
    c, x, b = rng.randint(2, 5), rng.randint(2, 9), rng.randint(1, 20)
    rest = rng.randint(2, 5)
    a, d = c + rest, b + rest * x
    steps = f"{a}x-{c}x={rest}x {d}-{b}={rest * x} x={rest * x}/{rest}={x}"
    return f"{a}x+{b}={c}x+{d}", steps, x


def equation(rng: Random, difficulty: int) -> Worked:
    """Level 1: small sums; 2: larger sums and products; 3: two steps; 4: two steps, larger; 5: x on both sides."""
    if difficulty == 1:
        text, steps, x = one_step_sum(rng, 20)
    elif difficulty == 2:
        text, steps, x = one_step_sum(rng, 80) if rng.random() < 0.5 else one_step_product(rng)
    elif difficulty == 3:
        text, steps, x = two_step(rng, 9, 20)
    elif difficulty == 4:
        text, steps, x = two_step(rng, 19, 60)
    else:
        text, steps, x = both_sides(rng)
    return Worked(rng.choice(PHRASES).format(text), steps, str(x))

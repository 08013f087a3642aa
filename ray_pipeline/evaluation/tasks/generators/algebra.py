"""Algebra: values of terms, two equations, quadratics, exponents."""

from __future__ import annotations

from random import Random

from ray_pipeline.evaluation.tasks.item import Problem


def signed(value: int) -> str:
    """A term to append: `+3`, `-3`."""
    return f"+{value}" if value >= 0 else str(value)


def substitution(rng: Random, level: int) -> Problem:
    """The value of a term at given x (and y)."""
    x, y, a, b = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9), rng.randint(-20, 20) or 7
    if level == 1:
        return Problem(f"If x={x}, what is {a}x?", str(a * x))
    if level == 2:
        return Problem(f"If x={x}, what is {a}x{signed(b)}?", str(a * x + b))
    if level == 3:
        return Problem(f"If x={x} and y={y}, what is {a}x{signed(b)}y?", str(a * x + b * y))
    if level == 4:
        return Problem(f"If x={x}, what is x^2{signed(a)}x{signed(b)}?", str(x * x + a * x + b))
    return Problem(f"If x={x} and y={y}, what is {a}xy+(x-y)^2{signed(b)}?", str(a * x * y + (x - y) ** 2 + b))


def term(factor: int, name: str) -> str:
    """`3x`, `x`."""
    return name if factor == 1 else f"{factor}{name}"


def system(rng: Random, level: int) -> Problem:
    """Two equations in x and y with one whole solution."""
    x, y = rng.randint(1, 9 * level), rng.randint(1, 9 * level)
    if level == 1:
        return Problem(f"x+y={x + y} and x-y={x - y}. What is x?", str(x))
    a = rng.randint(2, 4 + level)
    if level <= 3:
        return Problem(f"y={a}x and x+y={x + a * x}. What is x?" if level == 2 else
                     f"x+y={x + y} and {a}x+y={a * x + y}. What is y?", str(x if level == 2 else y))  # fmt: skip
    b = rng.randint(2, 9)
    c = rng.randint(1, 9)
    d = next(d for d in range(1, 10) if a * d != b * c)
    return Problem(f"{a}x+{b}y={a * x + b * y} and {term(c, 'x')}+{term(d, 'y')}={c * x + d * y}. What is x?", str(x))


def quadratic(rng: Random, level: int) -> Problem:
    """The larger solution of a quadratic with whole solutions."""
    low, high = sorted(rng.sample(range(1, 6), 2)) if level <= 2 else sorted(rng.sample(range(-9, 10), 2))
    if level == 1:
        return Problem(f"What is the positive solution of x^2={high**2}?", str(high))
    scale = rng.randint(2, 5) if level == 5 else 1
    b, c = -scale * (low + high), scale * low * high
    first = "x^2" if scale == 1 else f"{scale}x^2"
    middle = "" if b == 0 else f"{signed(b)}x"
    return Problem(f"What is the larger solution of {first}{middle}{signed(c)}=0?", str(high))


def exponents(rng: Random, level: int) -> Problem:
    """The exponent of a product, quotient or power of powers."""
    m, n, k = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 4)
    if level <= 2:
        return Problem(f"x^{m}*x^{n} is x to which power?", str(m + n))
    if level == 3:
        return Problem(f"x^{m + n}/x^{n} is x to which power?", str(m))
    if level == 4:
        return Problem(f"(x^{m})^{k} is x to which power?", str(m * k))
    return Problem(f"(x^{m}*x^{n})^{k}/x^{m} is x to which power?", str((m + n) * k - m))

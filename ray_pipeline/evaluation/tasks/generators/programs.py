"""Python: what a short program prints, and functions to write with tests. Programs here are built, never run."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from ray_pipeline.evaluation.tasks.item import Problem

ASK = "What does this Python program print?\n"
WORDS = ("apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "garden", "window", "silver")


def integer_arithmetic(rng: Random, level: int) -> Problem:
    """// and % and ** and precedence."""
    a, b, c = rng.randint(10, 99), rng.randint(2, 9), rng.randint(2, 9)
    if level == 1:
        return Problem(f"{ASK}print({a} + {b} * {c})", str(a + b * c))
    if level == 2:
        return Problem(f"{ASK}print({a} // {b})", str(a // b))
    if level == 3:
        return Problem(f"{ASK}print({a} % {b} + {c} ** 2)", str(a % b + c**2))
    if level == 4:
        return Problem(f"{ASK}x = {a}\nx -= {b} * {c}\nprint(x // {b} - x % {c})", str(_level_four(a, b, c)))
    x = a ^ (b << 2)
    return Problem(f"{ASK}x = {a} ^ ({b} << 2)\nprint(x & {c * 3}, -x // {b})", f"{x & (c * 3)} {-x // b}")


def _level_four(a: int, b: int, c: int) -> int:
    x = a - b * c
    return x // b - x % c


def loops(rng: Random, level: int) -> Problem:
    """Sums, products and counts in loops."""
    n, k = rng.randint(3, 5 + level), rng.randint(2, 5)
    if level == 1:
        return Problem(f"{ASK}total = 0\nfor i in range({n}):\n    total += i\nprint(total)", str(sum(range(n))))
    if level == 2:
        return Problem(
            f"{ASK}total = {k}\nfor i in range(1, {n}):\n    total += {k} * i\nprint(total)",
            str(k + sum(k * i for i in range(1, n))),
        )
    if level == 3:
        stop = 5 * n
        count = sum(1 for i in range(stop) if i % k == 1)
        return Problem(
            f"{ASK}count = 0\nfor i in range({stop}):\n    if i % {k} == 1:\n        count += 1\nprint(count)",
            str(count),
        )
    if level == 4:
        pairs = sum(1 for i in range(n) for j in range(i) if (i + j) % k == 0)
        body = f"for i in range({n}):\n    for j in range(i):\n        if (i + j) % {k} == 0:\n            pairs += 1"
        return Problem(f"{ASK}pairs = 0\n{body}\nprint(pairs)", str(pairs))
    start, steps = rng.randint(3, 12), 0
    x = start
    while x != 1:
        x = x // 2 if x % 2 == 0 else 3 * x + 1
        steps += 1
    body = "while x != 1:\n    x = x // 2 if x % 2 == 0 else 3 * x + 1\n    steps += 1"
    return Problem(f"{ASK}x, steps = {start}, 0\n{body}\nprint(steps)", str(steps))


def sequences(rng: Random, level: int) -> Problem:
    """Strings and lists: indexing, slices, comprehensions, sorting."""
    word, other = rng.sample(WORDS, 2)
    numbers = [rng.randint(1, 20) for _ in range(3 + level)]
    i = rng.randrange(len(word))
    if level == 1:
        return Problem(f'{ASK}print("{word}"[{i}])', word[i])
    if level == 2:
        return Problem(f'{ASK}print(len("{word}" + "{other}") * 2)', str(2 * len(word + other)))
    if level == 3:
        return Problem(f'{ASK}print("{word}"[::-1][:3])', word[::-1][:3])
    if level == 4:
        return Problem(
            f"{ASK}print(sum(n for n in {numbers} if n % 2 == 0))", str(sum(n for n in numbers if not n % 2))
        )
    value = "".join(sorted(set(word) & set(other) | {word[0]}))
    return Problem(f'{ASK}a, b = "{word}", "{other}"\nprint("".join(sorted(set(a) & set(b) | {{a[0]}})))', value)


def functions(rng: Random, level: int) -> Problem:
    """Calls, defaults, closures and recursion."""
    a, b, n = rng.randint(2, 9), rng.randint(2, 9), rng.randint(3, 4 + level)
    if level == 1:
        return Problem(f"{ASK}def f(x):\n    return {a} * x + {b}\n\nprint(f({n}))", str(a * n + b))
    if level == 2:
        return Problem(f"{ASK}def f(x, y={b}):\n    return x - y\n\nprint(f({a}) + f({n}, 1))", str(a - b + n - 1))
    if level == 3:
        return Problem(f"{ASK}def f(x):\n    return x * x - {a}\n\nprint(f(f({b})))", str((b * b - a) ** 2 - a))
    if level == 4:
        value = a
        for _ in range(n):
            value = value + b
        code = f"def f(n):\n    return {a} if n == 0 else f(n - 1) + {b}"
        return Problem(f"{ASK}{code}\n\nprint(f({n}))", str(value))
    values = [1, a]
    for _ in range(n - 1):
        values.append(values[-1] + b * values[-2])
    code = f"def f(n):\n    if n < 2:\n        return [1, {a}][n]\n    return f(n - 1) + {b} * f(n - 2)"
    return Problem(f"{ASK}{code}\n\nprint(f({n}))", str(values[n]))


class Exercise(NamedTuple):
    """A function to write.

    Attributes:
        tests: Python that raises unless the function is right. solution: one that passes.
    """

    prompt: str
    tests: str
    solution: str


def _exercise(what: str, solution: str, calls: list[tuple[str, object]]) -> Exercise:
    name = solution.split("(")[0].removeprefix("def ").strip()
    signature = solution.split("\n")[0].removeprefix("def ").rstrip(":")
    tests = "\n".join(f"assert {name}({arguments}) == {value!r}" for arguments, value in calls)
    return Exercise(f"Write a Python function {signature} that returns {what}.", tests, solution)


def _calls(function: Callable[[int], object], values: list[int]) -> list[tuple[str, object]]:
    return [(str(v), function(v)) for v in values]


# What level 1 to 5 is about.
EXERCISES = ("operation", "loop", "condition", "text", "algorithm")


def exercise(rng: Random, level: int) -> Exercise:
    """Level 1: one operation; 2: a loop; 3: a condition in a loop; 4: strings; 5: an algorithm."""
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    values = sorted(rng.sample(range(1, 30), 4))
    if level == 1:
        return _exercise(f"{a} times n plus {b}", f"def f(n):\n    return {a} * n + {b}\n",
                         _calls(lambda n: a * n + b, values))  # fmt: skip
    if level == 2:
        return _exercise(
            f"the sum of the whole numbers from 1 to n, each times {a}",
            f"def f(n):\n    return {a} * n * (n + 1) // 2\n",
            _calls(lambda n: a * n * (n + 1) // 2, values),
        )
    if level == 3:
        return _exercise(
            f"how many of the whole numbers from 1 to n are divisible by {a} or by {b}",
            f"def f(n):\n    return sum(i % {a} == 0 or i % {b} == 0 for i in range(1, n + 1))\n",
            _calls(lambda n: sum(i % a == 0 or i % b == 0 for i in range(1, n + 1)), values),
        )
    if level == 4:
        words = rng.sample(WORDS, 3)
        return _exercise(
            f"the text s with every {a}th letter in upper case (the {a}th, the {2 * a}th and so on)",
            f'def f(s):\n    return "".join(c.upper() if (i + 1) % {a} == 0 else c for i, c in enumerate(s))\n',
            [(repr(w), "".join(c.upper() if (i + 1) % a == 0 else c for i, c in enumerate(w))) for w in words],
        )
    return _exercise(
        f"the n-th prime number (the first is 2) times {a}",
        f"def f(n):\n    found, i = [], 2\n    while len(found) < n:\n        if all(i % p for p in found):\n"
        f"            found.append(i)\n        i += 1\n    return {a} * found[-1]\n",
        _calls(lambda n: a * _prime(n), values),
    )


def _prime(n: int) -> int:
    found: list[int] = []
    i = 2
    while len(found) < n:
        if all(i % p for p in found):
            found.append(i)
        i += 1
    return found[-1]

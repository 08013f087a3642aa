"""Exact arithmetic on what a model wrote: a syntax tree is walked, nothing is executed."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from ray_pipeline.tools.tool import ToolError

MAX_CHARACTERS = 500
MAX_BITS = 2048
"""Of a numerator or denominator: some 600 digits."""

_WRITTEN = str.maketrans({"×": "*", "·": "*", "÷": "/", "\N{MINUS SIGN}": "-", "–": "-"})
_DECIMAL = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


class CannotCompute(ToolError):
    """Why an expression has no value."""


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise CannotCompute(f"the exponent {exponent} is not a whole number")
    if base == 0 and exponent < 0:
        raise CannotCompute("division by zero")
    # Looked at before it is computed: 9**9**9 has 370 million digits.
    if _bits(base) * abs(exponent) > MAX_BITS and abs(base) not in (0, 1):
        raise CannotCompute("the number gets too large")
    return Fraction(base**exponent)


def _nonzero(operation: Callable[[Fraction, Fraction], Any]) -> Callable[[Fraction, Fraction], Fraction]:
    def divide(a: Fraction, b: Fraction) -> Fraction:
        if b == 0:
            raise CannotCompute("division by zero")
        return Fraction(operation(a, b))

    return divide


_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: _nonzero(lambda a, b: a / b),
    ast.FloorDiv: _nonzero(lambda a, b: a // b),
    ast.Mod: _nonzero(lambda a, b: a % b),
    ast.Pow: _power,
}


def _whole(numbers: tuple[Fraction, ...]) -> list[int]:
    for number in numbers:
        if number.denominator != 1:
            raise CannotCompute(f"{number} is not a whole number")
    return [int(number) for number in numbers]


def _round(number: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    (places,) = _whole((digits,))
    if abs(places) > 100:
        raise CannotCompute(f"cannot round to {places} places")
    return Fraction(round(number, places))


def _square_root(number: Fraction) -> Fraction:
    if number < 0:
        raise CannotCompute(f"{number} has no real square root")
    root = Fraction(math.isqrt(number.numerator), math.isqrt(number.denominator))
    if root * root != number:
        raise CannotCompute(f"the square root of {number} is not rational")
    return root


_FUNCTIONS: dict[str, Callable[..., Fraction]] = {
    "abs": lambda a: Fraction(abs(a)),
    "min": lambda *a: min(a),
    "max": lambda *a: max(a),
    "round": _round,
    "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)),
    "gcd": lambda *a: Fraction(math.gcd(*_whole(a))),
    "lcm": lambda *a: Fraction(math.lcm(*_whole(a))),
    "sqrt": _square_root,
}


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


class _Evaluator:
    def __init__(self, source: str):
        self.source = source

    def value(self, node: ast.expr) -> Fraction:
        result = self._value(node)
        if _bits(result) > MAX_BITS:
            raise CannotCompute("the number gets too large")
        return result

    def _value(self, node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            # By its own letters: 0.1 is a tenth, not the float nearest to it.
            text = (ast.get_source_segment(self.source, node) or "").replace("_", "")
            if not _DECIMAL.fullmatch(text):
                raise CannotCompute(f"{text[:40]} is not a number")
            return Fraction(text)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return _BINARY[type(node.op)](self.value(node.left), self.value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
            operand = self.value(node.operand)
            return -operand if isinstance(node.op, ast.USub) else operand
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node.func.id, [self.value(argument) for argument in node.args])
        raise CannotCompute(f"{(ast.get_source_segment(self.source, node) or '')[:40]!r} is not arithmetic")

    def _call(self, name: str, values: list[Fraction]) -> Fraction:
        if name not in _FUNCTIONS:
            raise CannotCompute(f"there is no function {name[:40]}; there are {', '.join(_FUNCTIONS)}")
        try:
            return _FUNCTIONS[name](*values)
        except (TypeError, ValueError):
            raise CannotCompute(f"{name} does not take {len(values)} numbers") from None


def evaluate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression; `^` is a power.

    Raises:
        CannotCompute: it is no arithmetic, divides by zero, or is too long or too large.
    """
    if len(expression) > MAX_CHARACTERS:
        raise CannotCompute(f"more than {MAX_CHARACTERS} characters")
    source = expression.translate(_WRITTEN).replace("^", "**").strip()
    try:
        return _Evaluator(source).value(ast.parse(source, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null character, or 5,000 digits
        raise CannotCompute("not an arithmetic expression") from None


def written(value: Fraction) -> str:
    """An exact number: 42, 0.125 where the decimals end, else 1/3."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest != 1 or places > 30:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


class Calculator:
    """The tool `calculator`."""

    name = "calculator"
    description = "Computes an arithmetic expression exactly."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "for example (3+4)*2/5"}},
        "required": ["expression"],
    }

    def call(self, arguments: Mapping[str, Any]) -> str:
        """The value as text.

        Raises:
            CannotCompute: it has none.
        """
        return written(evaluate(arguments["expression"]))

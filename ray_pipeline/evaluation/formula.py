"""Formulas in text as sympy expressions, by a grammar of its own: nothing of the text is ever evaluated as Python.

    formula := sum                       sum     := ["+" | "-"] product (("+" | "-") product)*
    product := power (("*" | "/") power | power)*        side by side is a product: 3x, 2(x+1)
    power   := atom ["^" ["-"] power]    atom    := number | letter | pi | name "(" sum ")" | "(" sum ")"

Sizes are bounded while it is read, because sympy computes powers of numbers at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import sympy

MOST_CHARACTERS = 400
MOST_DIGITS = 40  # of one number
MOST_EXPONENT = 20
MOST_BITS = 20_000  # of a number that a power makes
MOST_DEPTH = 40

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sqrt": sympy.sqrt, "abs": sympy.Abs, "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "exp": sympy.exp,
    "ln": sympy.log,
}  # fmt: skip
_SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": " pi ", "√": " sqrt "})
_SUPERSCRIPTS = {"²": "^2", "³": "^3"}
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|([A-Za-z]+)|(\*\*|[-+*/^()]))")


class NotUnderstood(ValueError):
    """No formula, or one that is too large; the message says why."""


def plain(text: str) -> str:
    r"""The signs of mathematics and common LaTeX (`\frac{1}{2}`, `\sqrt{2}`, `\cdot`) as plain text."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.translate(_SIGNS))
    for sign, power in _SUPERSCRIPTS.items():
        text = text.replace(sign, power)
    text = re.sub(r"\\(?:left|right|displaystyle|[,;!() \[\]{}])|\$", " ", text)
    text = re.sub(r"\\(?:cdot|times)\b", "*", text)
    for _ in range(MOST_DEPTH):  # the innermost first
        text, fractions = re.subn(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        text, roots = re.subn(r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)", text)
        text, powers = re.subn(r"\^\{([^{}]*)\}", r"^(\1)", text)
        if not fractions + roots + powers:
            break
    return re.sub(r"\\(sqrt|pi|sin|cos|tan|exp|ln)\b", r"\1", text)


def read_formula(text: str, denominators: list[sympy.Expr] | None = None) -> sympy.Expr:
    """The expression that a text means; decimals are exact fractions, letters real unknowns.

    Args:
        denominators: what it divides by is added here.
    Raises:
        NotUnderstood: with the reason.
    """
    if len(text) > MOST_CHARACTERS:
        raise NotUnderstood(f"the formula has {len(text)} characters, more than the {MOST_CHARACTERS} that are read")
    parser = _Parser(_tokens(plain(text)), text.strip())
    value = parser.whole()
    if denominators is not None:
        denominators += parser.denominators
    return value


def symbol(letter: str) -> sympy.Symbol:
    """The unknown of that name, a real number."""
    return sympy.Symbol(letter, real=True)


def _tokens(text: str) -> list[str]:
    out, at = [], 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise NotUnderstood(f'the sign "{text[at:].strip()[:1]}" in "{text.strip()}"')
        out.append("^" if found[3] == "**" else found[0].strip())
        at = found.end()
    return out


class _Parser:
    def __init__(self, tokens: list[str], text: str):
        self.tokens, self.text = tokens, text
        self.at = self.depth = 0
        self.denominators: list[sympy.Expr] = []  # sympy cancels x^2/x to x, which is defined at 0

    def whole(self) -> sympy.Expr:
        if not self.tokens:
            raise NotUnderstood("there is no formula")
        value = self.sum()
        if self.at < len(self.tokens):
            raise NotUnderstood(f'"{self.tokens[self.at]}" in "{self.text}" belongs to nothing')
        if value.has(sympy.zoo, sympy.nan, sympy.oo):
            raise NotUnderstood(f'"{self.text}" divides by zero')
        return value

    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.next()
        if not token:
            raise NotUnderstood(f'"{self.text}" ends before its {"bracket closes" if wanted else "formula does"}')
        if wanted and token != wanted:
            raise NotUnderstood(f'"{token}" in "{self.text}" stands where "{wanted}" should')
        self.at += 1
        return token

    def sum(self) -> sympy.Expr:
        sign = self.take() if self.next() in ("+", "-") else "+"
        total = self.product()
        total = -total if sign == "-" else total
        while self.next() in ("+", "-"):
            sign = self.take()
            term = self.product()
            total = total + term if sign == "+" else total - term
        return total

    def product(self) -> sympy.Expr:
        value, divided = self.power(), False
        while self.next() and self.next() not in ("+", "-", ")"):
            sign = self.take() if self.next() in ("*", "/") else ""
            if not sign and self.next()[0].isdigit():
                raise NotUnderstood(f'"{self.text}" has a number right behind another factor')
            if not sign and divided:
                raise NotUnderstood(f'"{self.text}" can be read in two ways: write brackets around what is divided by')
            negative = bool(sign) and self.next() == "-" and bool(self.take())
            factor = -self.power() if negative else self.power()
            if sign == "/":
                self.denominators.append(factor)
                value, divided = value / factor, True
            else:
                value, divided = value * factor, divided and not sign
        return value

    def power(self) -> sympy.Expr:
        base = self.atom()
        if self.next() != "^":
            return base
        self.take()
        self.deeper()
        negative = self.next() == "-" and bool(self.take())
        exponent = -self.power() if negative else self.power()
        self.depth -= 1
        if exponent.is_negative:
            self.denominators.append(base)
        return _power(base, exponent, self.text)

    def atom(self) -> sympy.Expr:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            if len(token) > MOST_DIGITS:
                raise NotUnderstood(f"a number of {len(token)} digits, more than the {MOST_DIGITS} that are read")
            return sympy.Rational(token)
        if token == "(":
            self.deeper()
            value = self.sum()
            self.take(")")
            self.depth -= 1
            return value
        if token.lower() == "pi":
            return sympy.pi
        if token.lower() in FUNCTIONS:
            self.deeper()
            inside = self.atom()
            self.depth -= 1
            return FUNCTIONS[token.lower()](inside)
        if len(token) == 1 and token.isalpha():
            return symbol(token)
        raise NotUnderstood(f'the word "{token}"' if token.isalpha() else f'"{token}" in "{self.text}"')

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise NotUnderstood(f"brackets or powers nested more than {MOST_DEPTH} deep")


def _power(base: sympy.Expr, exponent: sympy.Expr, text: str) -> sympy.Expr:
    """base ^ exponent, where the result stays small.

    Raises:
        NotUnderstood: it would not.
    """
    if exponent.is_number and not exponent.is_Rational:
        raise NotUnderstood(f'the power in "{text}" is no fraction')
    if base.is_number:
        if exponent.is_Rational and exponent.is_negative and base.is_zero:
            raise NotUnderstood(f'"{text}" divides by zero')
        bits = max((abs(n).p.bit_length() + n.q.bit_length() for n in base.atoms(sympy.Rational)), default=1)
        if not exponent.is_Rational or abs(exponent) * bits > MOST_BITS:
            raise NotUnderstood(f'the power in "{text}" makes too large a number, or none that is known')
    elif not exponent.is_Rational or abs(exponent) * _degree(base) > MOST_EXPONENT:
        raise NotUnderstood(f'the power in "{text}" is over {MOST_EXPONENT}, or unknown itself')
    return base**exponent


def _degree(expression: sympy.Expr) -> sympy.Rational:
    """At least the highest power of an unknown in it, brackets multiplied out."""
    if expression.is_Symbol:
        return sympy.Integer(1)
    if expression.is_Pow:
        exponent = expression.exp if expression.exp.is_Rational else sympy.Integer(1)
        return abs(exponent) * _degree(expression.base)
    parts = [_degree(part) for part in expression.args] or [sympy.Integer(0)]
    return sum(parts, sympy.Integer(0)) if expression.is_Mul else max(parts)

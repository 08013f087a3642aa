"""Is an answer to an equation or a formula right? sympy solves it by itself, over the real numbers.

In a process of its own that is ended when it takes too long: algebra can take forever.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy

from ray_pipeline.evaluation.formula import NotUnderstood
from ray_pipeline.evaluation.formula_text import Problem, Stated, read_answer, read_problem
from ray_pipeline.isolation.function_pool import Call, FunctionPool

MEMORY_BYTES = 4 << 30  # of address space
Status = Literal["VERIFIED", "WRONG", "CANNOT CHECK"]
_ADDRESS = f"{__name__}:confined_verdict"


@dataclass(frozen=True)
class Verdict:
    """status, what it rests on in a sentence, and the right answer where it is known."""

    status: Status
    detail: str
    right: str | None = None


def check_solution(question: str, answer: str, seconds: float = 10.0) -> Verdict:
    """Hold an answer against sympy's, in another process.

    Args:
        question: "3x+5=20", "Solve 3x+5=20.", "What is 3*(4+5)?". answer: "5", "x = 5", "x = 2 or x = 3".
    """
    with FunctionPool([_ADDRESS], timeout_seconds=seconds, processes=1) as pool:
        [outcome] = pool.run([Call(_ADDRESS, (question, answer))])
    if outcome.error is not None:
        return Verdict("CANNOT CHECK", f"sympy {outcome.error}.")
    return Verdict(*outcome.value)


def confined_verdict(question: str, answer: str) -> list[Any]:
    """`verdict` as plain values, in a process that may use so much memory."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    found = verdict(question, answer)
    return [found.status, found.detail, found.right]


def verdict(question: str, answer: str) -> Verdict:
    """As `check_solution`, here and without a limit of time."""
    try:
        problem = read_problem(question)
        right = _Right(problem)
    except NotUnderstood as error:
        return Verdict("CANNOT CHECK", f"the question is not understood: {error}.")
    except _Unsolved as error:
        return Verdict("CANNOT CHECK", f"{error}.")
    except NotImplementedError:
        return Verdict("CANNOT CHECK", "sympy has no method for this.")
    try:
        stated = read_answer(answer)
    except NotUnderstood as error:
        return Verdict("CANNOT CHECK", f"the answer is not understood: {error}.", right.text())
    problem_text = right.difference(stated)
    if problem_text is None:
        return Verdict("VERIFIED", right.reason(stated), right.text())
    return Verdict("WRONG", problem_text, right.text())


class _Unsolved(Exception):
    """Understood, but there is no single answer to hold another one against."""


class _Right:
    """sympy's own answer: values by unknown ("" for the value of an expression), none of them, or all numbers."""

    def __init__(self, problem: Problem):
        self.values: dict[str, list[sympy.Expr]] = {}
        self.all = False
        if problem.expression is not None:
            self.values[""] = [problem.expression]
            return
        equations = [left - right for left, right in problem.equations]
        sides = [side for equation in problem.equations for side in equation]
        unknowns = sorted(set().union(*(side.free_symbols for side in sides)), key=str)
        if not unknowns:
            true = all(sympy.simplify(e) == 0 for e in equations)
            raise _Unsolved(f"there is no unknown: the equation is {'true' if true else 'false'}")
        if len(unknowns) == 1 and len(equations) == 1:
            self._one(equations[0], unknowns[0], problem.denominators)
        elif problem.unknown in unknowns and len(equations) == 1:
            self.values[str(problem.unknown)] = list(sympy.solve(equations[0], problem.unknown))
        else:
            self._system(equations, unknowns)

    def _one(self, equation: sympy.Expr, unknown: sympy.Symbol, denominators: Sequence[sympy.Expr]) -> None:
        found = sympy.solveset(equation, unknown, sympy.S.Reals)
        self.all = found == sympy.S.Reals
        if self.all and not any(below.free_symbols for below in denominators):
            self.values[str(unknown)] = []
        elif isinstance(found, sympy.FiniteSet) or found is sympy.S.EmptySet:
            allowed = [x for x in found if not any(sympy.simplify(d.subs(unknown, x)) == 0 for d in denominators)]
            self.values[str(unknown)] = sorted(allowed, key=sympy.default_sort_key)
        else:
            raise _Unsolved(f"sympy finds no list of solutions, but {str(found)[:120]}")

    def _system(self, equations: list[sympy.Expr], unknowns: list[sympy.Symbol]) -> None:
        found = sympy.solve(equations, unknowns, dict=True)
        free = any(len(one) < len(unknowns) or any(v.free_symbols for v in one.values()) for one in found)
        if free or len(found) > 1:
            names = ", ".join(map(str, unknowns))
            raise _Unsolved(f"{len(equations)} equation{'s' * (len(equations) > 1)} in {names}: more than one solution")
        self.values = {str(unknown): [one[unknown] for one in found] for unknown in unknowns}

    def text(self) -> str:
        """As one would write it."""
        if self.all:
            return "every number"
        if not any(self.values.values()):
            return "no real solution"
        parts = [
            f"{name} = {value}" if name else str(value) for name, values in self.values.items() for value in values
        ]
        return (" or " if len(self.values) == 1 else ", ").join(parts)

    def difference(self, stated: Stated) -> str | None:
        """What is wrong with an answer, in a sentence; None where it is right."""
        nothing = not self.all and not any(self.values.values())
        if self.all or nothing or stated.kind != "values":
            kind = "all" if self.all else "nothing" if nothing else "values"
            return None if stated.kind == kind else f"The right answer is: {self.text()}."
        given = {name: list(values) for name, values in stated.named.items()}
        if stated.values:
            if given or len(self.values) > 1:
                if "" not in self.values:
                    return "It does not say which unknown has which value."
            given = {next(iter(self.values)): [*stated.values]}
        elif "" in self.values:  # "x = 42" as the value of an expression
            given = {"": [value for values in given.values() for value in values]}
        for name, values in self.values.items():
            extra = [v for v in given.get(name, []) if not any(_same(v, r, stated) for r in values)]
            missing = [r for r in values if not any(_same(v, r, stated) for v in given.get(name, []))]
            if extra:
                return f"{name + ' = ' if name else ''}{extra[0]} is no solution. The right answer is: {self.text()}."
            if missing:
                return f"It lacks {name + ' = ' if name else ''}{missing[0]}. The right answer is: {self.text()}."
        return None

    def reason(self, stated: Stated) -> str:
        """What a right answer rests on."""
        values = [value for values in self.values.values() for value in values]
        rounded = [v for v in stated.decimals if not any(sympy.simplify(v - r) == 0 for r in values)]
        return f"sympy finds {self.text()}" + (", which the answer rounds." if rounded else ".")


def _same(given: sympy.Expr, right: sympy.Expr, stated: Stated) -> bool:
    """Equal, or the right value rounded to as many decimals as the answer has."""
    if sympy.simplify(given - right) == 0:
        return True
    places = stated.decimals.get(given)
    if places is None or not right.is_number or right.is_Integer:
        return False
    return bool(abs(sympy.N(right - given, 30)) <= sympy.Rational(1, 2 * 10**places))

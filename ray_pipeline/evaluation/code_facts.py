"""Facts about Python source, from its syntax tree alone: nothing of it is run or imported.

Cyclomatic complexity is McCabe's (1976): one, and one more for every place where the way through the code parts.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ray_pipeline.errors import UserError

MOST_BYTES = 1_000_000  # parsing takes some hundred times as much memory
LOOPS = (ast.For, ast.AsyncFor, ast.While)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Statements whose bodies count as one level deeper.
NESTING = (ast.If, *LOOPS, ast.Try, ast.TryStar, ast.With, ast.AsyncWith, ast.Match)


@dataclass
class FunctionFacts:
    """One function or method.

    Attributes:
        name: with the classes and functions around it: "Shop.total". line: first one. lines: how many.
        arguments: as they are called, with * and **. branches: if, elif, case, except, and conditional expressions.
        loops: for, while and the clauses of comprehensions. nesting: levels of blocks inside each other.
    """

    name: str
    line: int
    lines: int
    arguments: list[str]
    branches: int
    loops: int
    complexity: int
    nesting: int


@dataclass
class CodeFacts:
    """A file: lines, imported modules, classes with their bases, functions in the order of the file."""

    lines: int
    imports: list[str] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)
    functions: list[FunctionFacts] = field(default_factory=list)


def read_source(path: Path) -> str:
    """The text of a Python file.

    Raises:
        UserError: missing, a folder, too large, or no text.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}. Give a Python file.")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: {path.stat().st_size} bytes, more than the {MOST_BYTES} that are read. Give a part.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text (byte {error.start}). Give a Python file.") from None
    if "\0" in text:
        raise UserError(f"{path}: holds a zero byte, so it is no text. Give a Python file.")
    return text


def code_facts(text: str, name: str) -> CodeFacts:
    """What is in a source text.

    Raises:
        UserError: it is no Python, with the line, or nested deeper than Python itself reads.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the user's strings
            tree = ast.parse(text)
            facts = CodeFacts(len(text.splitlines()))
            _collect(tree, "", facts)
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{name}{line}: no Python ({error.msg}). Give a file that Python can read.") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{name}: nested too deeply for Python to read. Give a simpler file.") from None
    return facts


def _collect(node: ast.AST, prefix: str, facts: CodeFacts) -> None:
    """Enter what lies in `node`, in the order of the file; `prefix` ends with a dot or is empty."""
    for child in ast.iter_child_nodes(node):
        inside = prefix
        if isinstance(child, ast.Import):
            facts.imports += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            facts.imports.append("." * child.level + (child.module or ""))
        elif isinstance(child, ast.ClassDef):
            facts.classes[prefix + child.name] = [ast.unparse(base) for base in child.bases]
            inside = f"{prefix}{child.name}."
        elif isinstance(child, FUNCTIONS):
            facts.functions.append(_function(child, prefix))
            inside = f"{prefix}{child.name}."
        _collect(child, inside, facts)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> FunctionFacts:
    inner = list(_own_nodes(node))
    branches = sum(isinstance(n, ast.If | ast.IfExp | ast.ExceptHandler) or _may_not_match(n) for n in inner)
    loops = sum(isinstance(n, (*LOOPS, ast.comprehension)) for n in inner)
    # Each `and` and `or` may end the evaluation, and so may each `if` of a comprehension and an assert.
    joined = sum(len(n.values) - 1 for n in inner if isinstance(n, ast.BoolOp))
    joined += sum(len(n.ifs) for n in inner if isinstance(n, ast.comprehension))
    joined += sum(isinstance(n, ast.Assert) for n in inner)
    end = node.end_lineno or node.lineno
    return FunctionFacts(
        prefix + node.name,
        node.lineno,
        end - node.lineno + 1,
        _arguments(node.args),
        branches,
        loops,
        1 + branches + loops + joined,
        max((_depth(statement) for statement in node.body), default=0),
    )


def _may_not_match(node: ast.AST) -> bool:
    """A case of a match statement that parts the way; `case _` takes what is left."""
    if not isinstance(node, ast.match_case):
        return False
    return node.guard is not None or not (isinstance(node.pattern, ast.MatchAs) and node.pattern.pattern is None)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes inside, but those of functions and classes inside: these are counted by themselves."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            yield from _own_nodes(child)


def _arguments(given: ast.arguments) -> list[str]:
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [argument.arg for argument in given.kwonlyargs]
    return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])


def _depth(node: ast.AST) -> int:
    """Blocks inside each other, this one included; an `elif` is no deeper than its `if`."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return 0
    own = int(isinstance(node, NESTING))
    deepest = 0
    for name, value in ast.iter_fields(node):
        children = [child for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)]
        is_elif = (
            isinstance(node, ast.If) and name == "orelse" and len(children) == 1 and isinstance(children[0], ast.If)
        )
        for child in children:
            deepest = max(deepest, _depth(child) - int(is_elif))
    return own + deepest

"""`explain`: what a model says of a Python file, beside what its syntax tree says."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.model_answer import ModelAnswer, answer_options, ask, open_model

if TYPE_CHECKING:
    from rich.table import Table

    from ray_pipeline.evaluation.code_facts import CodeFacts

QUESTION = "Explain what this Python code does.\n\n```python\n{}\n```"


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(path_type=Path))
@answer_options
def explain(model: str, file: Path, as_json: bool, **options: object) -> int:
    """Let MODEL (a run, RUN:STAGE or a model folder) explain a Python FILE, beside facts of its syntax tree.

    The facts are counted, not guessed: functions, arguments, branches, loops, complexity, nesting. The file is not run.
    """
    from ray_pipeline.evaluation.code_facts import code_facts, read_source

    text = read_source(file)
    facts = code_facts(text, str(file))
    question = QUESTION.format(text.strip("\n"))
    loaded, source = open_model(model, options)
    hint = "Give a smaller file, or a model with a longer context."
    reply = ask(loaded, source, question, options, subject=f"{file} with the question", hint=hint)
    if as_json:
        click.echo(json.dumps(as_values(file, reply, facts), indent=2, ensure_ascii=False))
    else:
        show(file, reply, facts)
    return 0


def mentioned(name: str, text: str) -> bool:
    """Whether the explanation names a function, by its last name."""
    return re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", text) is not None


def as_values(file: Path, reply: ModelAnswer, facts: CodeFacts) -> dict[str, object]:
    """What `--json` prints."""
    functions = [asdict(f) | {"mentioned": mentioned(f.name, reply.text)} for f in facts.functions]
    return {
        "kind": "explanation",
        "file": str(file),
        **reply.as_values(),
        "facts": asdict(facts) | {"functions": functions},
    }


def show(file: Path, reply: ModelAnswer, facts: CodeFacts) -> None:
    """The explanation, then the facts."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 120)
    reply.show(console)
    classes = ", ".join(f"{name}({', '.join(bases)})" if bases else name for name, bases in facts.classes.items())
    console.print(
        f"\n{file}: {facts.lines} lines, {len(facts.functions)} functions, {len(facts.classes)} classes"
        + (f" ({classes})" if classes else "")
        + (f"; imports {', '.join(dict.fromkeys(facts.imports))}" if facts.imports else ""),
        markup=False,
        highlight=False,
    )
    if facts.functions:
        console.print(_table(reply, facts))


def _table(reply: ModelAnswer, facts: CodeFacts) -> Table:
    from rich.markup import escape
    from rich.table import Table

    columns = ("function", "line", "lines", "arguments", "branches", "loops", "complexity", "nesting", "explained")
    table = Table(*columns)
    for f in facts.functions:
        table.add_row(
            escape(f.name), str(f.line), str(f.lines), escape(", ".join(f.arguments)), str(f.branches), str(f.loops),
            str(f.complexity), str(f.nesting), "named" if mentioned(f.name, reply.text) else "not named",
        )  # fmt: skip
    return table

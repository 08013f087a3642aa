"""`solve`: a model's steps and answer to a mathematical question, and whether sympy finds the same."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import click

from ray_pipeline.cli.model_answer import answer_options, ask, open_model
from ray_pipeline.errors import EXIT_FAILED, UserError

STYLES = {"VERIFIED": "bold green", "WRONG": "bold red", "CANNOT CHECK": "bold yellow"}


@click.command()
@click.argument("model")
@click.argument("question")
@click.option(
    "--check-seconds", type=click.FloatRange(0.1, 3600), default=10.0, show_default=True, help="For sympy to think."
)
@answer_options
def solve(model: str, question: str, check_seconds: float, as_json: bool, **options: object) -> int:
    """Let MODEL answer QUESTION, for example "3x + 5 = 20", and check the answer with sympy.

    Ends with VERIFIED (exit code 0), WRONG with the right answer, or CANNOT CHECK with the reason (exit code 1).
    """
    from rich.console import Console

    if not question.strip():
        raise UserError('QUESTION is empty: give an equation or a formula, for example "3x + 5 = 20".')
    loaded, source = open_model(model, options)

    from ray_pipeline.evaluation.solution_check import Verdict, check_solution
    from ray_pipeline.rewards.answer import extract

    reply = ask(loaded, source, worded(question), options)
    if reply.answer is None:
        found = Verdict("CANNOT CHECK", "the model was still thinking where it was cut, so there is no answer.")
    else:
        found = check_solution(question, extract(reply.answer), check_seconds)
    if as_json:
        click.echo(json.dumps({"kind": "solution", **reply.as_values(), "check": asdict(found)}, ensure_ascii=False))
    else:
        console = Console(width=None if Console().is_terminal else 120)
        console.print(f"{reply.model}: {reply.question}", markup=False, highlight=False)
        reply.show(console)
        console.print(f"{found.status}: {found.detail}", style=STYLES[found.status], markup=False, highlight=False)
        if found.status == "CANNOT CHECK" and found.right is not None:
            console.print(f"sympy finds {found.right}.", markup=False, highlight=False)
    return 0 if found.status == "VERIFIED" else EXIT_FAILED


def worded(question: str) -> str:
    """A bare formula as a question, as training has them; anything with words as it is."""
    from ray_pipeline.evaluation.formula_text import is_bare

    if not is_bare(question):
        return question.strip()
    formula = re.sub(r"\s*([-+*/^=()])\s*", r"\1", question.strip())
    return f"Solve {formula}." if "=" in formula else f"What is {formula}?"

#!/usr/bin/env python3
"""A reasoning trace: a run's model answers its held-out questions, its thinking drawn step by step and marked.

python scripts/demo_reasoning.py                     # the run changed last
python scripts/demo_reasoning.py RUN --questions 5
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ray_pipeline.cli.eval_target import find_model  # noqa: E402
from ray_pipeline.cli.runs import latest_run, output_dir  # noqa: E402
from ray_pipeline.data.tasks.question import prepared_questions  # noqa: E402
from ray_pipeline.errors import UserError  # noqa: E402
from ray_pipeline.evaluation.models import LanguageModel, load  # noqa: E402
from ray_pipeline.reasoning.parsed import parse  # noqa: E402
from ray_pipeline.rewards.answer import answer as mark  # noqa: E402


def show(console: Console, model: LanguageModel, question: str, expected: str, tokens: int) -> bool:
    """Ask, draw the trace, mark it."""
    prompt = model.prompt(question)
    [written] = model.backend.generate(
        [prompt], max_new_tokens=tokens, temperature=0.0, seeds=[0], eos_ids=model.eos_ids
    )
    text = model.text(prompt, written.tokens)
    found = parse(text)
    console.print(f"\n[bold]{escape(question)}[/bold]")
    for number, step in enumerate(found.steps, start=1):
        console.print(f"  [dim]{number:2d}  {escape(step)}[/dim]")
    right = mark(question, text, expected) == 1.0
    verdict = "[green]right[/green]" if right else f"[red]wrong[/red]: {escape(expected)} was asked for"
    said = "still thinking at the limit" if found.answer is None else found.answer.strip()
    console.print(f"  = [bold]{escape(said)}[/bold]  {verdict}")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run or a model folder")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--output-dir", help="folder of all runs")
    arguments = parser.parse_args()
    runs = output_dir(arguments.output_dir)
    try:
        source = find_model(arguments.run or str(latest_run(runs)), None, runs)
        model = load(source)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    if source.heldout is None:
        print(f"Error: {source.name} is no run and has no held-out questions. Name a run.", file=sys.stderr)
        return 2
    console = Console()
    console.print(f"{source.name}: {model.backend.parameters:,} weights")
    questions = prepared_questions(source.heldout, arguments.questions)
    tokens = source.max_new_tokens or 128
    right = sum(show(console, model, q["prompt"], q["answer"], tokens) for q in questions)
    console.print(f"\n{right} of {len(questions)} right")
    return 0


if __name__ == "__main__":
    sys.exit(main())

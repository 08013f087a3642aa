"""The report in the terminal: tables of figures, and answers to read."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_pipeline.evaluation.outcome import Report
from ray_pipeline.evaluation.results import TaskResult
from ray_pipeline.evaluation.tasks import known_tasks
from ray_pipeline.report.evaluation.wording import (
    accuracy_text,
    model_text,
    rate_texts,
    sampled_texts,
    share_text,
    test_text,
    verdict,
)

SHOWN_CHARACTERS = 240


def print_report(console: Console, report: Report, *, samples: int = 1) -> None:
    """All figures, and for each task so many right and wrong answers."""
    console.print(_main_table(report))
    for task in report.tasks:
        figures = task.figures()
        if len(figures.get("by_category", {})) > 1 or len(figures.get("by_difficulty", {})) > 1:
            console.print(_groups(task))
        for name, value in figures.get("other", {}).items():
            console.print(f"  {name}: {value:.4g}", markup=False, highlight=False)
        if figures.get("unmarked"):
            _warn(console, f"{task.name}: {figures['unmarked']} answers could not be marked and count as wrong.")
        if figures.get("too_long"):
            _warn(console, f"{task.name}: {figures['too_long']} prompts do not fit the context.")
        _print_samples(console, task, samples)
    if report.comparison:
        console.print(_comparison(report))


def print_tasks(console: Console) -> None:
    """Names, what may stand behind the colon, and what they ask."""
    table = Table("task", "what it asks", box=None)
    for entry in known_tasks().values():
        name = f"{entry.name}:{entry.takes}" if entry.takes else entry.name
        table.add_row(Text(name), Text(entry.summary))
    console.print(table)


def _warn(console: Console, text: str) -> None:
    console.print(Text(text, "yellow"))


def _main_table(report: Report) -> Table:
    table = Table(title=Text(model_text(report), "bold"), title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("questions", justify="right")
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("besides", overflow="fold")
    for task in report.tasks:
        figures = task.figures()
        texts = sampled_texts(figures) | rate_texts(figures)
        # Within an entry the spaces do not break, so that a name stays with its figure.
        besides = ", ".join(f"{name} {text}".replace(" ", "\N{NO-BREAK SPACE}") for name, text in texts.items())
        table.add_row(Text(task.name), str(figures["questions"]), Text(accuracy_text(figures)), Text(besides))
    return table


def _groups(task: TaskResult) -> Table:
    figures = task.figures()
    table = Table(title=Text(task.name, "bold"), title_justify="left")
    for name in ("category or level", "questions", "accuracy"):
        table.add_column(name, justify="left" if name.startswith("category") else "right")
    for key, label in (("by_category", "{}"), ("by_difficulty", "level {}")):
        groups = figures.get(key, {})
        if len(groups) > 1:
            for value, group in groups.items():
                table.add_row(Text(label.format(value or "–")), str(group["questions"]), Text(share_text(group)))
            table.add_section()
    return table


def _print_samples(console: Console, task: TaskResult, count: int) -> None:
    for right, word, style in ((True, "right", "green"), (False, "wrong", "red")):
        found = [(item, a) for item in task.items for a in item.answers if a.correct == right and a.fits][:count]
        for item, answer in found:
            text = Text.assemble((f"{task.name}, {word}: ", style), _shown(item.prompt), "\n  ")
            text.append(_shown(answer.completion) or "(nothing)", "dim")
            if not right:
                text.append(f"  (right is {_shown(item.reference)})")
            console.print(text)


def _shown(text: str) -> str:
    """The beginning of a text that a model or a file brings; what could steer the terminal is replaced."""
    cut = text[:SHOWN_CHARACTERS].strip()
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in cut)


def _comparison(report: Report) -> Table:
    assert report.other is not None
    table = Table(title=Text(f"against {model_text(report.other)}", "bold"), title_justify="left")
    for name in ("task", "here", "there", "difference, 95% interval, McNemar's exact test", ""):
        table.add_column(name, overflow="fold")
    for name, test in report.comparison.items():
        here, there = f"{100 * test.accuracy:.1f}%", f"{100 * test.other_accuracy:.1f}%"
        style = {"better": "green", "worse": "red"}.get(verdict(test), "dim")
        table.add_row(Text(name), here, there, Text(test_text(test)), Text(verdict(test), style))
    return table

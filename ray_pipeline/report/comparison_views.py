"""A comparison of runs in the terminal, and as a page (`templates/comparison.html`)."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_pipeline.evaluation.statistics import PairedTest
from ray_pipeline.records.artifacts import write_text
from ray_pipeline.report.comparison import Cell, Comparison
from ray_pipeline.report.evaluation.wording import test_text, verdict
from ray_pipeline.report.page_files import page

TITLE = "Comparison of "  # how the page's title begins
STYLES = {"better": "green", "worse": "red"}


def said(test: PairedTest | str) -> str:
    """`better: +4.0 points [+1.0, +7.1], better on 12 ...`, or why there is no test."""
    return test if isinstance(test, str) else f"{verdict(test)}: {test_text(test)}"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Settings, figures, and what the same questions say."""
    if comparison.settings:
        table = _table("Settings that differ", "setting", comparison.names)
        for name, values in comparison.settings.items():
            table.add_row(Text(name), *map(Text, values))
        console.print(table)
    else:
        console.print("The settings are the same, but for names and folders.")
    table = _table("What was reached", "stage", comparison.names)
    for row in comparison.stages:
        table.add_row(row.stage, *(Text(_cell_text(cell)) for cell in row.cells), end_section=True)
    console.print(table)
    for row in comparison.stages:
        for name, test in zip(comparison.names[1:], row.tests, strict=False):
            style_ = "dim" if isinstance(test, str) else STYLES.get(verdict(test), "")
            line = f"{row.stage}, {name} against {comparison.names[0]}: {said(test)}"
            console.print(line, style=style_, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, first: str, names: list[str]) -> Table:
    table = Table(first, title=title, title_justify="left")
    for name in names:
        table.add_column(Text(name))  # no markup: names and settings may hold brackets
    return table


def _cell_text(cell: Cell) -> str:
    interval = f"\n95% interval of the accuracy {cell.interval}" if cell.interval else ""
    rest = ", ".join(part for part in (cell.time, cell.digest) if part)
    return "\n".join(part for part in (cell.status, cell.figure + interval, rest) if part)


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page whole or not at all."""
    write_text(path, render_comparison(comparison))


def render_comparison(comparison: Comparison) -> str:
    """The page."""
    return page(
        "comparison.html",
        title=TITLE + ", ".join(comparison.names),
        comparison=comparison,
        said=said,
        verdict=lambda test: "" if isinstance(test, str) else verdict(test).split()[0],
    )

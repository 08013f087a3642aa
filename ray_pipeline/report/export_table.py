"""What became of exports and conversions, in the terminal: a row for each file and program, notes below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ray_pipeline.evaluation.proof import Check
from ray_pipeline.records.units import bytes_text, percent

_STYLES = {"passed": "green", "failed": "red", "refused": "red", "not run": "yellow"}
_WIDTH = 120  # of a pipe, where nobody says how wide it is


def print_checks(out: Path, checks: Sequence[Check]) -> None:
    """Print the table. out: the folder of the files, or the one file that was written."""
    console = Console(width=None if Console().is_terminal else _WIDTH)
    table = Table("file", "size", "read by", "result", box=SIMPLE_HEAD)
    for heading in ("same token", "mean |Δ log p|", "perplexity", "accuracy"):
        table.add_column(heading, justify="right")
    shown = ""
    for check in checks:
        first, shown = check.name != shown, check.name
        style = _STYLES[check.status]
        named = (check.name, bytes_text(_bytes(out, check.name))) if first else ("", "")
        program = check.program.partition(" (")[0]  # versions are in the card
        table.add_row(*named, program, f"[{style}]{check.status}[/{style}]", *_figures(check))
    console.print(table)
    for check in checks:
        for said in (*([check.detail] if check.detail else []), *check.notes):
            console.print(f"{check.name}: {said}", markup=False, highlight=False)


def _figures(check: Check) -> list[str]:
    """Agreement, difference, and what rounding cost, with the figure of full weights in brackets."""
    found = check.figures
    out = [
        percent(found["greedy_agreement"]) if "greedy_agreement" in found else "",
        f"{found['mean_logprob_difference']:.2g}" if "mean_logprob_difference" in found else "",
    ]
    for name, text in (("perplexity", "{:.4g}".format), ("accuracy", percent)):
        before = f" ({text(found[f'{name}_before'])})" if f"{name}_before" in found else ""
        out.append(text(found[name]) + before if name in found else "")
    return out


def _bytes(out: Path, name: str) -> int:
    path = out / name if out.is_dir() and (out / name).exists() else out
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())

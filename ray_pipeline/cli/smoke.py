"""`test`: does this installation work? A few steps of every stage in a throw-away folder, then one answer.

The stages run as `run` runs them, in a process of its own, so that a library that crashes is a row of the table too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ray_pipeline.errors import EXIT_FAILED, StageFailed, UserError
from ray_pipeline.settings.run_folder import CONFIG_FILE, RUN_FILE

RECIPE = RUN = "smoke"
LOG = "output.log"
POLL_SECONDS = 0.3
STOP_SECONDS = 60.0  # for Ray's processes to end by themselves
QUESTION = "What is 2+3?"
LAST_LINES = 15  # of the output, where nothing else says why


@dataclass(frozen=True)
class Part:
    """One row of the table. status: passed, failed or not run; detail: what was seen, or the cause."""

    name: str
    status: str
    seconds: float
    detail: str = ""


@click.command()
@click.option("--keep", is_flag=True, help="Leave the folder, and say where it is.")
@click.option("--minutes", type=click.FloatRange(0.1, 1440), default=20.0, show_default=True, help="Longest time.")
def smoke_test(keep: bool, minutes: float) -> int:
    """Try this installation in about a minute: all stages, export, reload, one answer. Exit code 1 if one fails."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    folder = Path(tempfile.mkdtemp(prefix="ray-pipeline-test-"))
    try:
        parts = run_parts(folder, minutes * 60)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    table = Table("part", "result", "time", "detail")
    for part in parts:
        style = {"passed": "green", "failed": "bold red"}.get(part.status, "yellow")
        table.add_row(part.name, f"[{style}]{part.status}[/]", f"{part.seconds:.0f} s", escape(part.detail))
    Console(width=None if Console().is_terminal else 120).print(table)
    failed = [part for part in parts if part.status == "failed"]
    if keep:
        click.echo(f"What it made is in {folder}")
    if failed:
        again = "" if keep else " `test --keep` leaves the files for a closer look."
        click.echo(f"FAILED at {failed[0].name}: {failed[0].detail}{again}", err=True)
        return EXIT_FAILED
    click.echo(f"This installation works ({sum(part.seconds for part in parts):.0f} s).")
    return 0


def run_parts(folder: Path, seconds: float) -> list[Part]:
    """Every part in turn; behind one that failed the others are not run."""
    parts = stage_parts(folder, seconds)
    if any(part.status != "passed" for part in parts):
        return [*parts, Part("reload", "not run", 0.0), Part("answer", "not run", 0.0)]
    return parts + answer_parts(folder)


def stage_parts(folder: Path, seconds: float) -> list[Part]:
    """The stages of the recipe, run by `run`; each is told when it has ended."""
    from ray_pipeline.settings.layers import find_recipe

    recipe = find_recipe(Path(RECIPE))
    command = [
        sys.executable, "-m", "ray_pipeline.cli", "run", "--config", str(recipe), "--run-name", RUN, "--output-dir",
        str(folder), "--no-wandb",
    ]  # fmt: skip
    settings = {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path), "OMP_NUM_THREADS": "1"}
    # A user's own settings, or another cluster, are not what is tried.
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_PIPELINE_") and k != "RAY_ADDRESS"}
    late = time.monotonic() + seconds
    click.echo(f"Running every stage in {folder} ...")
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=own | settings,
            start_new_session=True,
        )  # fmt: skip
        with ended(process):
            told: set[str] = set()
            while process.poll() is None and time.monotonic() < late:
                time.sleep(POLL_SECONDS)
                tell(folder / RUN, told)
            overdue = process.poll() is None
    tell(folder / RUN, told)
    cause = f"not done after {seconds / 60:g} minutes" if overdue else _last_words(folder / LOG)
    return stage_rows(entries(folder / RUN), cause)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leaves no process behind: asks `run` to end, which ends Ray, and then insists."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(STOP_SECONDS)


def entries(run_dir: Path) -> list[dict[str, Any]]:
    """What the ledger says of each stage; nothing before the run has begun."""
    from ray_pipeline.dag.ledger import read_status

    if not (run_dir / RUN_FILE).is_file() or not (run_dir / CONFIG_FILE).is_file():
        return []
    return read_status(run_dir)["stages"]


def tell(run_dir: Path, told: set[str]) -> None:
    """Print the stages that have ended since the last call."""
    with contextlib.suppress(UserError):  # read while it is being written
        for entry in entries(run_dir):
            if entry["stage"] not in told and entry["status"] in ("done", "learned_nothing", "failed"):
                told.add(entry["stage"])
                click.echo(f"  {entry['stage']}: {entry['status'].replace('_', ' ')}, {entry['seconds']:.0f} s")


def stage_rows(stages: list[dict[str, Any]], cause: str) -> list[Part]:
    """A row for each stage. A few steps teach nothing, so a stage that learned nothing has passed.

    Args:
        cause: what the program last said, for a stage that left no error of its own.
    """
    if not stages:
        return [Part("start", "failed", 0.0, cause)]
    rows: list[Part] = []
    for entry in stages:
        seconds = entry.get("seconds", 0.0)
        if entry["status"] in ("done", "learned_nothing"):
            rows.append(Part(entry["stage"], "passed", seconds, _figures(entry)))
        elif any(row.status == "failed" for row in rows):
            rows.append(Part(entry["stage"], "not run", seconds))
        else:
            rows.append(Part(entry["stage"], "failed", seconds, entry.get("error") or cause))
    return rows


def _figures(entry: dict[str, Any]) -> str:
    from ray_pipeline.report.summary import figure_text

    return figure_text(entry["stage"], entry.get("metrics") or {})


def _last_words(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if "Error: " in text:
        return text.rpartition("Error: ")[2].strip()[:1000]
    return "it said: " + " | ".join(text.splitlines()[-LAST_LINES:])[-1000:]


def answer_parts(folder: Path) -> list[Part]:
    """The exported model read back, and one answer of it."""
    from ray_pipeline.cli.eval_target import find_model
    from ray_pipeline.cli.model_answer import ask
    from ray_pipeline.evaluation.models import load

    started = time.monotonic()
    try:
        source = find_model(f"{RUN}:export", None, folder)
        model = load(source)
    except (UserError, StageFailed) as error:
        return [Part("reload", "failed", time.monotonic() - started, str(error)), Part("answer", "not run", 0.0)]
    loaded = time.monotonic()
    rows = [Part("reload", "passed", loaded - started, f"{model.backend.parameters:,} weights of {source.folder.name}")]
    try:
        reply = ask(model, source, QUESTION, {"max_new_tokens": 8, "temperature": 0.0, "seed": 0})
    except UserError as error:
        return [*rows, Part("answer", "failed", time.monotonic() - loaded, str(error))]
    said = f"{QUESTION} {reply.text!r} (after three steps it is noise)"
    return [*rows, Part("answer", "passed", time.monotonic() - loaded, said)]

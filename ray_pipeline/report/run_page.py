"""report.html: a run on one page that needs no other file, written while the run goes on (`templates/run.html`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.records.artifacts import write_text
from ray_pipeline.records.guard_file import interventions_text
from ray_pipeline.records.metrics_file import read_metrics
from ray_pipeline.records.progress import progress_text
from ray_pipeline.records.units import number_text, seconds_text
from ray_pipeline.report.charts import expert_maps, stage_charts
from ray_pipeline.report.page_files import page
from ray_pipeline.report.run_facts import (
    categories,
    commands,
    data_facts,
    embedded,
    environment,
    other_samples,
    same_questions,
)
from ray_pipeline.report.step_picture import step_picture
from ray_pipeline.report.summary import SummaryRow, summary_rows
from ray_pipeline.settings.run_folder import REPORT_FILE

RELOAD_SECONDS = 30  # of a page that is looked at while the run goes on
STEP_TITLES = {
    "F": "forward",
    "B": "backward",
    "I": "gradients of inputs",
    "W": "gradients of weights",
    "wait": "waiting for a message",
    "optimizer step": "optimizer step, with the sum of gradients over replicas",
}


def write_report(run_dir: Path, status: Mapping[str, Any]) -> Path:
    """Write the page for `ledger.read_status`'s answer into the run folder and return its path."""
    write_text(run_dir / REPORT_FILE, render(status))
    return run_dir / REPORT_FILE


def render(status: Mapping[str, Any]) -> str:
    """The page for `ledger.read_status`'s answer; reads the files of the stages' folders."""
    entries = status["stages"]
    began = [entry for entry in entries if "attempt" in entry]
    drawn = [_drawn(entry) for entry in began]
    running = status.get("worked_on_by") is not None and any(entry["status"] == "running" for entry in entries)
    invocations = status.get("invocations", [])
    return page(
        "run.html",
        title=status["run"],
        folder=status["run_dir"],
        cost=status.get("cost") or "",
        written=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime()),
        reload_seconds=RELOAD_SECONDS if running else 0,
        seconds=sum(entry.get("seconds") or 0.0 for entry in began),
        cards=_cards(entries),
        stages=[_said(entry, found) for entry, found in zip(began, drawn, strict=True)],
        guards=[(entry["stage"], text) for entry in began for text in interventions_text(entry.get("guards", []))],
        categories=categories(entries),
        questions=same_questions(entries),
        data=data_facts(entries),
        environment=environment(invocations),
        commands=commands(Path(status["run_dir"]), invocations),
        drawings=embedded({"reload": RELOAD_SECONDS if running else 0, "stages": drawn, "actions": STEP_TITLES}),
        seconds_text=seconds_text,
        number_text=number_text,
    )


def _drawn(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What scripts draw of a stage that began."""
    lines = read_metrics(Path(entry["folder"]))
    return {
        "stage": entry["stage"],
        "charts": stage_charts(lines, entry.get("baselines") or {}),
        "experts": expert_maps(lines),
        "step": step_picture(Path(entry["folder"])),
    }


def _said(entry: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What stands there of it as text."""
    return {
        "name": entry["stage"],
        "error": entry.get("error") or "",
        "damaged": entry.get("damaged", []),
        "guards": interventions_text(entry.get("guards", [])),
        "charts": drawn["charts"],
        "experts": drawn["experts"],
        "step": drawn["step"],
        "samples": other_samples(Path(entry["folder"])),
    }


def _cards(entries: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each stage of the chain: its row of the summary, when it worked, what it reads, how far it is."""
    rows: list[SummaryRow] = summary_rows(entries)
    begun = [entry["started"] for entry in entries if entry.get("started")]
    ends = [entry.get("finished") or time.time() for entry in entries if entry.get("started")]
    first, whole = min(begun, default=0.0), max(max(ends, default=0.0) - min(begun, default=0.0), 1e-9)
    cards = []
    for entry, row in zip(entries, rows, strict=True):
        started = entry.get("started")
        progress = entry.get("progress") if entry["status"] in ("running", "interrupted") else None
        end = entry.get("finished") or time.time()
        cards.append(
            {
                "row": row,
                "when": time.strftime("%H:%M:%S", time.localtime(started)) if started else "",
                "left": max(0.0, (started - first) / whole) if started else 0.0,
                "width": max(0.004, (end - started) / whole) if started else 0.0,
                "reads": list(entry.get("upstream") or {}),
                "ranks": entry.get("ranks"),
                "attempt": entry.get("attempt"),
                "digest": (entry.get("weights_digest") or "")[:12],
                "progress": progress_text(progress) if progress else "",
            }
        )
    return cards

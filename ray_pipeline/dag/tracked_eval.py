"""An evaluation as one more run of its run's group in every tracker that the run has."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.dag.tracked_stage import environment_facts, made_digest
from ray_pipeline.evaluation.outcome import Report
from ray_pipeline.evaluation.results import TaskResult
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.metrics_file import VALIDATION, MetricsFile
from ray_pipeline.records.trackers.tracker import Ending, TrackedRun
from ray_pipeline.records.trackers.tracking import Tracking, wanted
from ray_pipeline.settings.layers import yaml_layer
from ray_pipeline.settings.run_folder import CONFIG_FILE, RUN_FILE, SAMPLES_FILE
from ray_pipeline.settings.schema import TrackingConfig

EVALUATIONS = "evaluations"  # folder of a run: what each evaluation gave the trackers
STEP = 1  # it is measured once
MOST_SAMPLES = 100
NOT_A_NAME = r"[^\w.-]+"  # what trackers do not take in the name of a figure, such as a file's path


def run_of(model: Path) -> tuple[Path, Path] | None:
    """The run's folder and the stage's that a model lies in; None where it is of no run here."""
    for stage in (model, *model.parents):
        if (stage.parent / RUN_FILE).is_file() and (stage.parent / CONFIG_FILE).is_file():
            return stage.parent, stage
    return None


def track_evaluation(report: Report) -> str | None:
    """Tell the trackers of the run whose model was asked; returns what it is called there, None without any.

    Raises:
        UserError: its folder in the run cannot be written.
    """
    found = run_of(Path(report.model["folder"]).absolute())
    if found is None:
        return None
    run_dir, stage = found
    settings = TrackingConfig.model_validate(yaml_layer(run_dir / CONFIG_FILE).values.get("tracking", {}))
    if not wanted(settings):
        return None
    made, digest = stage.name.partition("-")[0], made_digest(stage)
    name = f"{stage.name.partition('.')[0]}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(report.created))}"
    folder = run_dir / EVALUATIONS / name
    figures = dict(_figures(report.tasks))
    lines = MetricsFile(folder, "eval")
    lines.log(STEP, figures)
    lines.close()
    write_sealed(folder / SAMPLES_FILE, {"samples": _samples(report.tasks)})
    run = TrackedRun(
        folder=folder, stage="eval", name=f"{run_dir.name}-eval-{name}", run_id=secrets.token_hex(4),
        group=run_dir.name, project=settings.project, entity=settings.entity,
        config={"model": report.model, "settings": report.settings, "made_from": {made: digest}} | environment_facts(),
        upstream={made: digest},
    )  # fmt: skip
    tracking = Tracking(settings, run)
    tracking.start()
    tracking.finish(Ending("DONE", 0, figures={**figures, "params": report.model["parameters"]}))
    return run.name


def _figures(tasks: list[TaskResult]) -> Iterator[tuple[str, float]]:
    """`val/heldout/accuracy` and what else is one number; the bounds of intervals beside it."""
    for task in tasks:
        figures = task.figures()
        shown: dict[str, Any] = {**figures, **figures.get("other", {})}
        for kind in ("pass_at_k", "maj_at_k"):
            shown |= {kind.replace("_k", f"_{k}"): group["value"] for k, group in figures.get(kind, {}).items()}
        if interval := figures.get("interval"):
            shown |= {"accuracy_low": interval[0], "accuracy_high": interval[1]}
        for name, value in shown.items():
            if isinstance(value, int | float):
                yield f"{VALIDATION}{re.sub(NOT_A_NAME, '_', task.name)}/{name}", float(value)


def _samples(tasks: list[TaskResult]) -> list[Mapping[str, Any]]:
    """The first answer to each question, as stages keep theirs."""
    return [
        {
            "prompt": item.prompt, "answer": item.reference, "category": item.category,
            **{name: getattr(item.answers[0], name) for name in
               ("completion", "correct", "well_formed", "tokens", "finished")},
        }
        for task in tasks for item in task.items[: MOST_SAMPLES // len(tasks)]
    ]  # fmt: skip

"""MLflow: the server that MLFLOW_TRACKING_URI names, else files in `mlruns/` beside the runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.records.trackers.tracker import Ending, Kind, TrackedRun, numbers
from ray_pipeline.settings.layers import flat

ID = "ray_pipeline.id"  # tag by which a run is found again
_MOST_METRICS, _MOST_PARAMS, _MOST_TEXT = 1000, 100, 500  # of one request, one request, one value
# Written last of a line. One that a kill cut short lacks it, so its figures' own steps are looked at too.
_MARKS: dict[Kind, str] = {"train": "train/step", "val": "val/step"}


class MlflowTracker:
    """One run of MLflow, found again by a tag; figures it has already are not sent twice."""

    def open(self, run: TrackedRun) -> Mapping[Kind, int]:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric: Any = Metric
        place = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder.parent.parent.absolute() / "mlruns").as_uri()
        self._client: Any = MlflowClient(tracking_uri=place)
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project)
        known = self._client.search_runs([experiment], filter_string=f"tags.`{ID}` = '{run.run_id}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {ID: run.run_id, "group": run.group, "stage": run.stage}
            self._id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
            texts = {key: str(value)[:_MOST_TEXT] for key, value in flat(dict(run.config)).items()}
            pairs = [Param(key, text) for key, text in texts.items() if text]
            for start in range(0, len(pairs), _MOST_PARAMS):
                self._client.log_batch(self._id, params=pairs[start : start + _MOST_PARAMS])
        names = self._client.get_run(self._id).data.metrics
        self._has = {name: max(m.step for m in self._client.get_metric_history(self._id, name)) for name in names}
        return {kind: self._has.get(mark, 0) for kind, mark in _MARKS.items()}

    def log(self, step: int, kind: Kind, figures: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        new = [(name, value) for name, value in numbers(figures).items() if self._has.get(name, -1) < step]
        metrics = [self._metric(name, value, now, step) for name, value in [*new, (_MARKS[kind], float(step))]]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MOST_METRICS])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._client.log_text(self._id, json.dumps(list(rows), indent=2), f"samples/step_{step:08d}.json")

    def alert(self, step: int, title: str, text: str) -> None:
        self._client.set_tag(self._id, f"alert.{step}", f"{title}: {text}")

    def finish(self, ending: Ending) -> None:
        for name, value in ending.summary().items():
            self._client.set_tag(self._id, f"summary.{name}".replace("@", "_at_"), str(value))
        for name, folder in ending.outputs.items():
            self._client.set_tag(self._id, f"output.{name}", f"{folder} {ending.digest or ''}".strip())
        self._client.set_terminated(self._id, status="FAILED" if ending.verdict == "FAILED" else "FINISHED")

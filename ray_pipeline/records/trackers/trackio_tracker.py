"""Trackio: a local database that `trackio show` reads, or the Space that TRACKIO_SPACE_ID names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import trackio
from trackio.sqlite_storage import SQLiteStorage

from ray_pipeline.records.metrics_file import is_validation
from ray_pipeline.records.trackers.tracker import SHOWN, Ending, Kind, TrackedRun, lists, numbers

SAMPLES = "val/samples"
ENDING = "ending"  # prefix of what is told once, at the end


class TrackioTracker:
    """One run of trackio, found again by its name, which has the run's id in it."""

    def open(self, run: TrackedRun) -> Mapping[Kind, int]:
        with redirect_stdout(StringIO()):  # advice on its dashboard
            self._run: Any = trackio.init(
                project=run.project, name=f"{run.name}-{run.run_id[:6]}", group=run.group, config=dict(run.config),
                resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        received: dict[Kind, int] = {"train": 0, "val": 0}
        for row in SQLiteStorage.get_logs(run.project, self._run.name, run_id=self._run.id):
            if not any(name.startswith(ENDING) for name in row) and SAMPLES not in row:
                kind: Kind = "val" if is_validation(row) else "train"
                received[kind] = max(received[kind], int(row["step"]))
        self._step = max(received.values())
        return received

    def log(self, step: int, kind: Kind, figures: Mapping[str, Any]) -> None:
        self._step = step
        loads = {
            name: trackio.Histogram(np_histogram=(np.array(values), np.arange(len(values) + 1)))
            for name, values in lists(figures).items()
        }
        self._run.log(numbers(figures) | loads, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        shown: list[Any] = [{name: row.get(name) for name in SHOWN} for row in rows]
        self._run.log({SAMPLES: trackio.Table(data=shown)}, step=step)

    def alert(self, step: int, title: str, text: str) -> None:
        self._run.alert(title=title, text=f"step {step}: {text}")

    def finish(self, ending: Ending) -> None:
        self._run.log({f"{ENDING}/{name}": value for name, value in ending.summary().items()}, step=self._step)
        with redirect_stdout(StringIO()):
            self._run.finish()

"""TensorBoard's event files, in `tensorboard/` of the stage's folder (`tensorboard --logdir runs/RUN`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboardX import SummaryWriter

from ray_pipeline.records.trackers.tracker import Ending, Kind, TrackedRun, lists, numbers
from ray_pipeline.settings.layers import flat

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Event files cannot be gone on with exactly, so they are written anew from what metrics.jsonl has."""

    def open(self, run: TrackedRun) -> Mapping[Kind, int]:
        shutil.rmtree(run.folder / FOLDER, ignore_errors=True)
        self._writer = SummaryWriter(str(run.folder / FOLDER))
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in flat(dict(run.config)).items())
        self._writer.add_text("config", f"| setting | value |\n| --- | --- |\n{rows}", 0)
        return {}

    def log(self, step: int, kind: Kind, figures: Mapping[str, Any]) -> None:
        for name, value in numbers(figures).items():
            self._writer.add_scalar(name, value, step)
        for name, values in lists(figures).items():
            self._writer.add_histogram_raw(
                name, min=0, max=len(values), num=sum(values), sum=sum(i * n for i, n in enumerate(values)),
                sum_squares=sum(i * i * n for i, n in enumerate(values)), bucket_limits=range(1, len(values) + 1),
                bucket_counts=values, global_step=step,
            )  # fmt: skip
        self._writer.flush()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for number, row in enumerate(rows):
            text = f"**{row.get('prompt')}**\n\n{row.get('completion')}\n\n(right: {row.get('answer')})"
            self._writer.add_text(f"val/samples/{number}", text, step)

    def alert(self, step: int, title: str, text: str) -> None:
        self._writer.add_text("alerts", f"{title}: {text}", step)

    def finish(self, ending: Ending) -> None:
        text = json.dumps(ending.summary() | {n: str(f) for n, f in ending.outputs.items()}, indent=2)
        self._writer.add_text("summary", f"```\n{text}\n```", 0)
        self._writer.close()

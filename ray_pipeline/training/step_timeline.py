"""One real step of a stage as every rank spent it, in timeline.json of the stage's folder. Recorded once a stage."""

from __future__ import annotations

from typing import Any

from model.parallel.gather import all_ranks_gather
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.spans import SpanRecorder, no_span
from ray_pipeline.records.artifacts import write_json
from ray_pipeline.settings.run_folder import TIMELINE_FILE
from ray_pipeline.training.rank import Rank

WARM_UP = 2  # steps of a process that are slower than those behind them: memory is taken, kernels are chosen
MOST_RANKS = 64  # that are kept; of more the first ones


class StepTimeline:
    """Decides which step is recorded, the same on every rank, and writes it down.

    Args:
        start: steps taken before.
    """

    def __init__(self, rank: Rank, engine: Engine, start: int):
        self.rank, self.engine = rank, engine
        self._first = min(start + WARM_UP + 1, rank.settings.steps)
        known = (rank.folder / TIMELINE_FILE).exists()
        self._wanted = not all(all_ranks_gather(rank.mesh, known))
        self._recorder: SpanRecorder | None = None

    def begin(self, done: int) -> None:
        """Step `done` (from 1) begins: record it if it is the one."""
        if self._wanted and done >= self._first:
            self._recorder = SpanRecorder(self.rank.device)
            self.engine.span = self._recorder.span

    def end(self, done: int, batch: Batch | None) -> None:
        """It has ended; one without a batch shows nothing, and the next is recorded instead."""
        if self._recorder is None:
            return
        recorder, self._recorder, self.engine.span = self._recorder, None, no_span
        if batch is None:
            return
        self._wanted = False
        place = {axis: self.rank.mesh.place[axis] for axis in ("pp", "dp", "sp", "tp")}
        found: list[tuple[Any, Any]] = all_ranks_gather(self.rank.mesh, (place, recorder.spans()))
        if self.rank.is_main:
            ranks = [{"place": where, "spans": spans} for where, spans in found[:MOST_RANKS]]
            layout = self.rank.config.layout
            write_json(
                self.rank.folder / TIMELINE_FILE,
                {"step": done, "ranks": ranks, "of": len(found), "schedule": layout.schedule},
            )

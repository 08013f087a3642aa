"""A profile of a few real steps of a stage: a trace of every rank, and where its time went.

It takes the place of `StepTimeline` in the loop of a stage that is run for this alone, in a folder of its own. Nothing
is saved or evaluated behind the profiled steps: `ProfileTaken` ends the loop.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from model.parallel.gather import all_ranks_gather
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.spans import SpanRecorder, no_span
from ray_pipeline.training.rank import Rank

# Beginnings of the names of messages between ranks: on a CPU calls, on a GPU kernels.
COLLECTIVES = {"cpu": ("c10d::", "gloo:"), "cuda": ("ncclDevKernel", "ncclKernel")}
MOST_OPERATIONS = 12  # that are listed, the longest first
MEMORY_ENTRIES = 200_000  # allocations that a snapshot of a GPU's memory remembers


class ProfileTaken(Exception):
    """The profiled steps are done. `ranks`: what each rank measured."""

    def __init__(self, ranks: list[dict[str, Any]]):
        super().__init__(ranks)
        self.ranks = ranks


class StepProfile:
    """Profiles the steps from `rank.profile["step"]` (counted from 1) on, and ends training behind them."""

    def __init__(self, rank: Rank, engine: Engine):
        assert rank.profile is not None
        self.rank, self.engine, self.wanted = rank, engine, rank.profile
        self.last = self.wanted["step"] + self.wanted["steps"] - 1
        self._profiler: Any = None
        self._recorder: SpanRecorder | None = None
        self._started = 0.0

    def begin(self, done: int) -> None:
        """Step `done` (from 1) begins."""
        if done != self.wanted["step"]:
            return
        cuda = self.rank.device.type == "cuda"
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_ENTRIES)
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
        self._profiler.__enter__()
        self._recorder = SpanRecorder(self.rank.device)
        self.engine.span = self._span
        self._started = time.monotonic()

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        assert self._recorder is not None
        with record_function(f"step: {name}"), self._recorder.span(name):
            yield

    def end(self, done: int, batch: Batch | None) -> None:
        """It has ended.

        Raises:
            ProfileTaken: it was the last of them.
        """
        if done < self.last:
            return
        assert self._recorder is not None
        spans = self._recorder.spans()  # waits for the GPU
        seconds = time.monotonic() - self._started
        self.engine.span = no_span
        self._profiler.__exit__(None, None, None)
        raise ProfileTaken(all_ranks_gather(self.rank.mesh, self._measured(spans, seconds) | self._write()))

    def _measured(self, spans: list[tuple[str, float, float]], seconds: float) -> dict[str, Any]:
        steps = self.wanted["steps"]
        spent: Counter[str] = Counter()
        for name, start, end in spans:
            spent[name] += (end - start) / steps
        events, names = self._profiler.key_averages(), COLLECTIVES[self.rank.device.type]
        messages = sum(_own_time(event) for event in events if event.key.startswith(names)) / steps
        longest = sorted(events, key=_own_time, reverse=True)
        return {
            "seconds": seconds / steps,
            "spans": dict(spent),
            "collectives": messages,
            "operations": [
                [event.key, _own_time(event) / steps, event.count / steps]
                for event in longest
                if not event.key.startswith(("step: ", *names))
            ][:MOST_OPERATIONS],
        }

    def _write(self) -> dict[str, Any]:
        """Files of this rank."""
        out, number = Path(self.wanted["out"]), self.rank.mesh.rank
        trace = out / f"rank-{number}.trace.json.gz"
        self._profiler.export_chrome_trace(str(trace))
        if self.rank.device.type != "cuda":
            return {"trace": trace.name, "memory_gb": psutil.Process().memory_info().rss / 1e9}
        snapshot = out / f"rank-{number}.memory.pickle"
        torch.cuda.memory._dump_snapshot(str(snapshot))
        torch.cuda.memory._record_memory_history(enabled=None)
        peak = torch.cuda.max_memory_allocated() / 1e9
        return {"trace": trace.name, "memory": snapshot.name, "memory_gb": peak}


def _own_time(event: Any) -> float:
    """Seconds, without what it called: on the GPU where it ran there, else on the CPU."""
    return float(event.self_device_time_total or event.self_cpu_time_total) / 1e6


def profiled(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: the stage as it is, until its profile is taken. Rank 0's value has every rank's figures."""
    try:
        importlib.import_module(f"ray_pipeline.stages.{arguments['stage']}").train(arguments)
    except ProfileTaken as taken:
        return {"ranks": taken.ranks}
    raise AssertionError("the stage ended before the step that was to be profiled")

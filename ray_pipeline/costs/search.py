"""Looks for the fastest layouts that fit a number of ranks: every legal one is a candidate, few need to be timed.

Branch and bound. A candidate waits under a bound that its step cannot beat: first one for its sizes alone, then with
its schedule and micro-batch, then with what it does to save memory; at last under its own time. What comes out of the
queue with its own time is the fastest of its sizes, and sizes whose bound is slower than all that is shown are out.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any, get_args

from ray_pipeline.costs.fit import Fit, judge
from ray_pipeline.costs.hardware_table import Hardware, for_ranks
from ray_pipeline.costs.timing import Timing, least_seconds, mean_work, step_timing
from ray_pipeline.costs.traffic import rank_traffic
from ray_pipeline.costs.workload import Workload, workload
from ray_pipeline.layout.choice import sizes_up_to
from ray_pipeline.layout.layout import Device, Layout
from ray_pipeline.layout.rules import refusal
from ray_pipeline.settings.layout_config import Schedule, ZeroStage
from ray_pipeline.settings.schema import PipelineFields

SHOWN = 8  # layouts
LIMIT = 25.0  # seconds
_SIZES = ("pp", "dp", "tp", "sp", "ep")
_SCHEDULES = get_args(Schedule)
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_ZERO_STAGES = get_args(ZeroStage)
_CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Found:
    """A layout that fits, with the rows of a forward pass."""

    work: Workload
    fit: Fit
    timing: Timing

    def flags(self) -> str:
        """How to ask for it on the command line."""
        return f"{self.work.layout.flags()} --set layout.micro_batch={self.work.micro_batch}"

    def sent(self) -> int:
        """Bytes that the rank which sends most sends in a step."""
        ranks = range(self.work.layout.pp)
        return max(sum(message.bytes for message in rank_traffic(self.work, rank)) for rank in ranks)

    def hours(self) -> float:
        """Ranks times hours that the whole stage takes."""
        return self.timing.seconds * self.work.steps * self.work.layout.gpus / 3600

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it. Bytes, seconds and plain numbers."""
        return {
            "flags": self.flags(),
            "layout": asdict(self.work.layout),
            "micro_batch": self.work.micro_batch,
            "needs": max(self.fit.needs),
            "sent": self.sent(),
            "timing": asdict(self.timing),
            "device_hours": self.hours(),
        }


@dataclass(frozen=True)
class Search:
    """What was found, fastest first; of layouts with the same sizes, the fastest.

    Attributes:
        sizes: legal ones there are. tried: of them, those that were gone through or are slower than what was found;
            fewer than all where time ran out.
        judged: layouts whose memory was worked out. least: bytes of the fullest rank of the one that needs least.
        usable: bytes that there are.
    """

    found: list[Found]
    sizes: int
    tried: int
    judged: int
    least: int
    usable: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**vars(self), "found": [one.as_dict() for one in self.found]}


class LayoutSearch:
    """Candidates of training stage `stage` on `start.gpus` ranks.

    Args:
        config: the settings that a layout must be legal for.
        start: number of ranks, and what is not searched for.
        keep: settings of `layout` (dp_size, schedule, micro_batch) that stay as they are in `start` and `config`.
    """

    def __init__(
        self, config: PipelineFields, stage: str, hardware: Hardware, start: Layout, keep: frozenset[str] = frozenset()
    ):
        device: Device = "cpu" if hardware.device == "cpu" else "cuda"
        self.config, self.stage, self.keep = config, stage, {key.removesuffix("_size") for key in keep}
        self.start = replace(start, device=device, pp_layout=None, min_gpus=None)
        self.hardware = for_ranks(hardware, start.gpus)
        self._number = count()
        self._fits: dict[tuple[Layout, int], Fit] = {}  # by layout and rows at once

    def run(self, *, shown: int = SHOWN, limit: float = LIMIT) -> Search:
        """The `shown` fastest that fit; after `limit` seconds, what was found until then."""
        until, found, tried = time.monotonic() + limit, list[Found](), 0
        # Larger micro-batches compute as much, and start fewer operations.
        sizes = [
            (mean_work(work, replace(self.hardware, launch=0.0)), next(self._number), work) for work in self._sizes()
        ]
        for bound, _, work in sorted(sizes):
            slowest = found[-1].timing.seconds if len(found) == shown else math.inf
            if bound >= slowest:
                tried = len(sizes)  # as those behind it
                break
            if time.monotonic() > until:
                break
            best, tried = self._fastest(work, slowest), tried + 1
            if best is not None:
                found = sorted([*found, best], key=lambda one: one.timing.seconds)[:shown]
        usable, least = self.hardware.memory - self.hardware.reserved, min(map(_needs, self._fits.values()), default=0)
        return Search(found, len(sizes), tried, len(self._fits), least, usable)

    def _fastest(self, work: Workload, below: float) -> Found | None:
        """Of layouts with these sizes that fit; None where no step takes less than `below` seconds."""
        queue: list[tuple[float, int, int, Workload | Found]] = [(0.0, next(self._number), 0, work)]
        while queue and queue[0][0] < below:
            _, _, level, first = heapq.heappop(queue)
            if isinstance(first, Found):
                return first
            for bound, refined in self._refined(level, first):
                heapq.heappush(queue, (bound, next(self._number), level + 1, refined))
        return None

    def _refined(self, level: int, work: Workload) -> Iterator[tuple[float, Workload | Found]]:
        """What a candidate becomes, under tighter bounds."""
        if level == 0:
            for changed in self._orders(work):
                yield least_seconds(changed, self.hardware, reduces=False), changed
        elif level == 1:
            for changed in self._savings(work):
                yield least_seconds(changed, self.hardware), changed
        elif (fit := self._judge(work)).fits:
            timing = step_timing(work, self.hardware)
            yield timing.seconds, Found(work, fit, timing)

    def _judge(self, work: Workload) -> Fit:
        key = (work.layout, work.micro_batch)
        if key not in self._fits:
            self._fits[key] = judge(work, self.hardware)
        return self._fits[key]

    def _sizes(self) -> Iterator[Workload]:
        """Every legal arrangement of the ranks, tensor parallelism within a node; nothing is recomputed."""
        plain = replace(
            self.start, schedule="1f1b", zero_stage=0, activation_checkpointing="none", offload_optimizer=False
        )
        for sizes in sizes_up_to(self.config, self.start.gpus):
            kept = all(sizes[axis] == getattr(self.start, axis) for axis in self.keep & set(_SIZES))
            if sizes["gpus"] != self.start.gpus or sizes["tp"] > self.hardware.node or not kept:
                continue
            layout = replace(plain, **sizes)
            if refusal(self.config, layout) is None:
                yield replace(workload(self.config, layout, self.stage, self.hardware.node), micro_batch=1)

    def _orders(self, work: Workload) -> Iterator[Workload]:
        """In what order, and in how many passes."""
        rows = [rows for rows in _MICRO_BATCHES if rows <= work.rows_per_replica]
        schedules = _SCHEDULES if work.layout.pp > 1 else ("1f1b",)
        *_, again = self._tried("activation_checkpointing", _CHECKPOINTING)
        for schedule in self._tried("schedule", schedules):
            for micro_batch in self._tried("micro_batch", rows):
                changed = replace(work, layout=replace(work.layout, schedule=schedule), micro_batch=micro_batch)
                savings = list(self._savings(changed))
                # What is computed again costs time alone; of the ZeRO stages none needs least memory everywhere.
                least = [saved for saved in savings if saved.layout.activation_checkpointing == again]
                if savings and not any(self._judge(saved).fits for saved in least):
                    break  # nor do more rows at once
                if savings:
                    yield changed

    def _savings(self, work: Workload) -> Iterator[Workload]:
        """What is sharded, and what is computed again to save memory."""
        stages = _ZERO_STAGES if work.replicas > 1 else (0,)
        for stage in self._tried("zero_stage", stages):
            for again in self._tried("activation_checkpointing", _CHECKPOINTING):
                layout = replace(
                    work.layout, zero_stage=stage, activation_checkpointing=again,
                    offload_optimizer=self.start.offload_optimizer,
                )  # fmt: skip
                changed = replace(work, layout=layout)
                if self._legal(changed):
                    yield changed

    def _tried(self, name: str, values: Iterable[Any]) -> Iterable[Any]:
        if name not in self.keep:
            return values
        return [self.config.layout.micro_batch if name == "micro_batch" else getattr(self.start, name)]

    def _legal(self, work: Workload) -> bool:
        layout = self.config.layout.model_copy(update={"micro_batch": work.micro_batch})
        return refusal(self.config.model_copy(update={"layout": layout}), work.layout) is None


def _needs(fit: Fit) -> int:
    return max(fit.needs)

"""What to change in a layout that does not fit: the changes that are tried, and those that help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ray_pipeline.costs.fit import device_bytes
from ray_pipeline.costs.hardware_table import Hardware
from ray_pipeline.costs.memory import rank_memory
from ray_pipeline.costs.timing import step_timing
from ray_pipeline.costs.workload import Workload
from ray_pipeline.layout.rules import refusal
from ray_pipeline.records.units import bytes_text, time_text
from ray_pipeline.settings.schema import PipelineFields

MOST = 3  # suggestions


@dataclass(frozen=True)
class _Change:
    """One setting and its new value; `field` of the layout, or micro_batch."""

    field: str
    value: Any

    def flag(self) -> str:
        if self.field == "micro_batch":
            return f"--set layout.micro_batch={self.value}"
        if self.field == "offload_optimizer":
            return "--offload-optimizer"
        name = {"activation_checkpointing": "activation-checkpointing", "zero_stage": "zero-stage"}.get(self.field)
        return f"--{name or f'{self.field}-size'} {self.value}"


_FULL = _Change("activation_checkpointing", "full")


def advise(config: PipelineFields, work: Workload, usable: int, hardware: Hardware) -> list[str]:
    """Flags that make every rank fit, with the memory and the step time they lead to; fewest changes, then fastest.

    The number of ranks stays; larger tp, sp or pp take replicas away. Three changes at once are tried with full
    activation checkpointing alone, which helps most: a plan should take about a second.
    """
    changes = list(_changes(work))
    for size in (1, 2, 3):
        found = []
        for combination in combinations(changes, size):
            if len({change.field for change in combination}) < size or (size == 3 and _FULL not in combination):
                continue
            changed = _changed(config, work, combination)
            if changed is None:
                continue
            most = _fullest(changed, hardware, usable)
            if most is not None:
                found.append((step_timing(changed, hardware).seconds, most, combination))
        if found:
            # A slower cousin of another suggestion would only take its place.
            found.sort(key=lambda entry: entry[:2])
            return [_text(*entry) for entry in found[:MOST]]
    return []


def _text(seconds: float, most: int, combination: tuple[_Change, ...]) -> str:
    flags = " ".join(change.flag() for change in combination)
    return f"{flags} ({bytes_text(most)}, {time_text(seconds)} a step)"


def _changes(work: Workload) -> Iterator[_Change]:
    layout = work.layout
    for value in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[layout.activation_checkpointing]:
        yield _Change("activation_checkpointing", value)
    if work.micro_batch > 1:
        yield _Change("micro_batch", 1)
    yield from (_Change("zero_stage", stage) for stage in range(layout.zero_stage + 1, 4))
    for field in ("ep", "tp", "sp", "pp"):
        size = getattr(layout, field)
        yield from (_Change(field, size * factor) for factor in (2, 4, 8))
    if not layout.offload_optimizer and layout.zero_stage >= 2:
        yield _Change("offload_optimizer", True)


def _changed(config: PipelineFields, work: Workload, changes: tuple[_Change, ...]) -> Workload | None:
    """The workload after the changes; None where no such layout is legal on the same number of ranks."""
    values = {change.field: change.value for change in changes}
    micro_batch = values.pop("micro_batch", work.micro_batch)
    layout = replace(work.layout, pp_layout=None, **values)
    others = layout.pp * layout.tp * layout.sp
    if layout.gpus % others:
        return None
    layout = replace(layout, dp=layout.gpus // others, min_gpus=None)
    if micro_batch != work.micro_batch:
        config = config.model_copy(update={"layout": config.layout.model_copy(update={"micro_batch": micro_batch})})
    if refusal(config, layout) is not None:
        return None
    return replace(work, layout=layout, micro_batch=micro_batch)


def _fullest(work: Workload, hardware: Hardware, usable: int) -> int | None:
    """Memory of the fullest rank, or None as soon as one does not fit."""
    most = 0
    for pp_rank in range(work.layout.pp):
        most = max(most, device_bytes(work, rank_memory(work, pp_rank, hardware.device), hardware.device))
        if most > usable:
            return None
    return most

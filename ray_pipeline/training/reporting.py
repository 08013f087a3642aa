"""What is told of training as it goes: figures of an interval of steps, of every rank, and of evaluations.

Names are section/figure. The loop's own are in train/, perf/, memory/ and system/; what the objective and the source of
batches measure is in the objective's section, unless the name says another.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from model.layers.auxiliary import LOSSES
from model.parallel.gather import all_ranks_gather
from ray_pipeline.costs.hardware_table import peak_of
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.step_stats import StepStats
from ray_pipeline.objectives.base import Objective
from ray_pipeline.records.metrics_file import VALIDATION, MetricsFile
from ray_pipeline.records.progress import stop_reason
from ray_pipeline.training.rank import Rank

GB = 1e9
MOST_RANKS = 64  # whose memory is logged one by one; of more the least and the most alone


class Interval:
    """Losses and tokens of the steps since figures were logged last, and the time they took."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin with nothing."""
        self.losses: list[float] = []
        self.steps, self.tokens, self.since = 0, 0, time.monotonic()

    def add(self, stats: StepStats, batch: Batch | None) -> None:
        """Count a step; None: it had nothing to learn from."""
        self.steps += 1
        if batch is not None:
            self.losses.append(stats.loss)
            self.tokens += stats.tokens

    def loss(self) -> float:
        """Mean over the steps that learned something; 0 where none did."""
        return sum(self.losses) / len(self.losses) if self.losses else 0.0

    def seconds(self) -> float:
        """Of all its steps, without evaluations and saving."""
        return max(time.monotonic() - self.since, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside out of the time."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start


class Reporter:
    """Made on every rank, since ranks tell rank 0 of their memory; rank 0 writes.

    Args:
        start, evaluated: as `MetricsFile` takes them.
    """

    def __init__(self, rank: Rank, engine: Engine, objective: Objective, *, start: int, evaluated: bool):
        self.rank, self.engine, self.objective, self.settings = rank, engine, objective, rank.settings
        self.interval = Interval()
        self.stop_reason: str | None = None  # why training is to save and stop, known to every rank
        self.file: MetricsFile | None = None
        if rank.is_main:
            self.file = MetricsFile(rank.folder, rank.stage, resume_step=start, evaluated=evaluated)

    def go_back(self, start: int, *, evaluated: bool) -> None:
        """Forget what was told of steps past `start`, which are taken again."""
        if self.file is not None:
            self.file.close()
            self.file = MetricsFile(self.rank.folder, self.rank.stage, resume_step=start, evaluated=evaluated)
        self.interval.restart()

    def step(
        self, done: int, stats: StepStats, batch: Batch | None, rate: float, source: Mapping[str, float]
    ) -> dict[str, float]:
        """Tell of the interval that ends with step `done`, and begin the next.

        Args:
            source: figures of the source of batches.
        Returns:
            What goes into the trainer's history.
        """
        interval = self.interval
        seconds, loss = interval.seconds(), interval.loss()
        history = {"train_loss": loss} | {_last(n): value for n, value in stats.figures.items() if n.count("/") < 2}
        ranks = self._of_ranks()
        speed = interval.tokens / seconds
        if self.file is not None:
            optimizer = self.settings.optimizer
            figures = {"train/loss": loss, "train/grad_norm": stats.grad_norm, "train/lr": rate}
            figures |= {"train/clipped": float(stats.grad_norm > optimizer.grad_clip), "train/tokens": interval.tokens}
            figures |= self._named(stats.means())
            figures |= {name if "/" in name else f"train/{name}": value for name, value in stats.figures.items()}
            figures |= self._named(source) | self._speed(speed, seconds) | system_figures(self.rank)
            self.file.log(done, figures | ranks)
        if self.rank.progress is not None:
            layers = {name: stats.figures[key] for name in LOSSES for key in stats.figures if _last(key) == name}
            self.rank.progress.update(done, loss=loss, tokens_per_second=speed, layer_losses=layers)
        interval.restart()
        return history

    def evaluation(self, done: int, figures: Mapping[str, float]) -> None:
        """Tell of the evaluation after step `done`."""
        if self.file is not None:
            self.file.log(done, {VALIDATION + name: value for name, value in figures.items()})

    def close(self) -> None:
        """Training is over."""
        if self.file is not None:
            self.file.close()

    def _named(self, figures: Mapping[str, float]) -> dict[str, float]:
        return {name if "/" in name else f"{self.objective.section}/{name}": v for name, v in figures.items()}

    def _speed(self, speed: float, seconds: float) -> dict[str, float]:
        """Tokens per second, seconds of a step and of its phases on rank 0, and the share of the peak that is used."""
        steps = max(self.interval.steps, 1)
        out = {"perf/tokens_per_second": speed, "perf/step_seconds": seconds / steps}
        for phase, spent in self.rank.status.take_seconds().items():
            out[f"perf/{phase.replace(' ', '_').replace('/', '_')}_seconds"] = spent / steps
        peak = (
            peak_of(torch.cuda.get_device_name(), self.settings.precision) if self.rank.device.type == "cuda" else None
        )
        if peak is not None:
            flops = self.engine.config.flops_per_token(self.rank.config.data.seq_len)
            out["perf/mfu"] = speed * flops / (peak * self.rank.mesh.world)
        return out

    def _of_ranks(self) -> dict[str, Any]:
        """Memory of every rank, tokens of every expert by layer, and whether to stop. One message between the ranks."""
        place = self.rank.mesh.place
        first = not any(place[axis] for axis in ("dp", "sp", "tp"))  # loads are the same on all replicas
        loads = {n: load.tolist() for n, load in self.engine.expert_loads.items()} if first else {}
        reason = stop_reason(self.rank.folder.parent) if self.rank.is_main else None
        found = all_ranks_gather(self.rank.mesh, (memory_gb(self.rank.device), loads, reason))
        self.stop_reason = found[0][2]
        memory = [used for used, *_ in found]
        out: dict[str, Any] = {"memory/max_gb": max(memory), "memory/min_gb": min(memory)}
        if len(memory) <= MOST_RANKS:
            out |= {f"memory/rank_{index}_gb": used for index, used in enumerate(memory)}
        for part in (part for _, part, _ in found if part):
            out |= {f"moe/{name.removesuffix('.mlp.gate.')}/load": load for name, load in part.items() if any(load)}
        return out


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def memory_gb(device: torch.device) -> float:
    """Most of a GPU's memory that tensors held so far; of a CPU rank what its process holds now. In 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    return psutil.Process().memory_info().rss / GB


def system_figures(rank: Rank) -> dict[str, float]:
    """Of rank 0's machine."""
    memory = psutil.virtual_memory()
    return {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_percent": memory.percent,
        "system/disk_free_gb": shutil.disk_usage(rank.folder).free / GB,
    }

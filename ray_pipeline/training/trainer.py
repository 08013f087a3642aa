"""The one training loop. Stages differ in where batches come from and in the objective, not here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

from ray_pipeline.data.batch import Batch
from ray_pipeline.engine.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from ray_pipeline.engine.engine import Engine, StepStats
from ray_pipeline.engine.optimizer import learning_rate
from ray_pipeline.errors import UserError
from ray_pipeline.objectives.base import Objective
from ray_pipeline.tracking import Tracker
from ray_pipeline.training.rank import Rank

Evaluate = Callable[[], dict[str, float]]


class BatchSource(Protocol):
    """Where batches come from. A pure function of (seed, step), so that a resumed run reads the same."""

    def batch(self, step: int) -> Batch:
        """The global batch of optimizer step `step`; the same on every rank."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the latest batch worth logging (rewards, lengths)."""
        ...


class Trainer:
    """Runs optimizer steps, evaluates, checkpoints, reports; goes on from the newest whole checkpoint by itself."""

    def __init__(self, rank: Rank, engine: Engine, objective: Objective):
        self.rank, self.engine, self.objective = rank, engine, objective
        self.settings = rank.settings
        self.checkpoints = rank.folder / "checkpoints"
        self.history: dict[str, float] = {}

    def fit(self, source: BatchSource, evaluate: Evaluate) -> dict[str, float]:
        """Train to the last step.

        Returns:
            The last evaluation's figures and `train_loss` (mean of the last logged interval).
        """
        start = self._resume()
        tracker = self._tracker(start)
        settings, tokens, since = self.settings, 0, time.monotonic()
        losses: list[float] = []
        for step in range(start, settings.steps):
            rate = learning_rate(settings.optimizer, step, settings.steps)
            batch = source.batch(step)
            stats = self.engine.train_step(batch, self.objective, rate)
            self._refuse_nan(stats, step)
            losses.append(stats.loss)
            tokens += batch.tokens.numel()
            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                speed = tokens / max(time.monotonic() - since, 1e-9)
                self.history["train_loss"] = sum(losses) / len(losses)
                self._log(tracker, done, stats, rate, speed, source.metrics())
                losses, tokens, since = [], 0, time.monotonic()
            if done % settings.eval_every == 0 or done == settings.steps:
                paused = time.monotonic()
                self._evaluated(tracker, done, evaluate())
                since += time.monotonic() - paused
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                paused = time.monotonic()
                save_checkpoint(self.engine, self.checkpoints, done, self.history, keep=settings.keep_checkpoints)
                since += time.monotonic() - paused
        if tracker is not None:
            tracker.finish(self.history)
        return dict(self.history)

    def _resume(self) -> int:
        found = list_checkpoints(self.checkpoints)
        if not found:
            return 0
        saved = load_checkpoint(self.engine, found[-1])
        step = int(saved.pop("step"))
        self.history = saved
        return step

    def _tracker(self, start: int) -> Tracker | None:
        rank = self.rank
        if not rank.is_main:
            return None
        return Tracker(
            rank.folder, rank.stage, rank.config, wandb_id=rank.wandb_id, group=rank.run_name, resume_step=start
        )

    def _refuse_nan(self, stats: StepStats, step: int) -> None:
        if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
            name = self.rank.stage
            raise UserError(
                f"{name}: loss {stats.loss} and gradient norm {stats.grad_norm} at step {step + 1}: training diverged. "
                f"Lower {name}.optimizer.lr ({self.settings.optimizer.lr}) or raise {name}.optimizer.warmup_steps; "
                "the last checkpoint is untouched."
            )

    def _log(
        self, tracker: Tracker | None, done: int, stats: StepStats, rate: float, speed: float, more: dict[str, float]
    ) -> None:
        if tracker is None:
            return
        figures = {"loss": self.history["train_loss"], "grad_norm": stats.grad_norm, "lr": rate}
        figures |= {name: value / stats.weight for name, value in stats.metrics.items()}
        tracker.log(done, {f"train/{k}": v for k, v in (figures | more).items()} | {"tokens_per_second": speed})
        if self.rank.progress is not None:
            self.rank.progress.update(done, loss=figures["loss"], tokens_per_second=speed)

    def _evaluated(self, tracker: Tracker | None, done: int, figures: dict[str, float]) -> None:
        self.history |= figures
        if tracker is not None:
            tracker.log(done, {f"eval/{name}": value for name, value in figures.items()})

"""The one training loop. Stages differ in where batches come from and in the objective, not here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from model.layers.auxiliary import LOSSES
from model.parallel.gather import all_ranks_gather
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.checkpoints.checkpoint import (
    UnusableCheckpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    source_files,
    step_of,
)
from ray_pipeline.engine.checkpoints.checkpoint_writer import CheckpointWriter
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.optimizer import learning_rate
from ray_pipeline.engine.step_stats import StepStats
from ray_pipeline.errors import UserError
from ray_pipeline.objectives.base import Objective
from ray_pipeline.records.trackers import Tracker
from ray_pipeline.settings.run_folder import CHECKPOINTS
from ray_pipeline.training.health import Health
from ray_pipeline.training.rank import Rank

Evaluate = Callable[[], dict[str, float]]
FIGURES = ("preference_accuracy", "accuracy", "validation_loss")  # the first that is measured tells the best checkpoint
TIES = ("preference_loss", "validation_loss")  # and of equal accuracies the lower of the first of these
NOTHING_LEARNED = StepStats(loss=0.0, grad_norm=0.0, weight=1.0, metrics={})  # a step without a batch


class BatchSource(Protocol):
    """Where batches come from. A pure function of (seed, step), so that a resumed run reads the same."""

    def batch(self, step: int) -> Batch | None:
        """The global batch of optimizer step `step`; the same on every rank. None: there is nothing to learn from."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the latest batch worth logging (rewards, lengths)."""
        ...


@runtime_checkable
class SourceWithState(Protocol):
    """A source that depends on more than (seed, step), which checkpoints carry."""

    def resumable(self, step: int) -> bool:
        """Whether training can go on from a checkpoint written when `step` steps are done."""
        ...

    def state(self) -> dict[str, bytes]:
        """Files of a checkpoint, by name; the same on every rank."""
        ...

    def load_state(self, files: dict[str, bytes]) -> None:
        """Go on from what `state` gave."""
        ...


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: of preferences or of answers where they are measured, else of the validation loss.

    Attributes:
        loss: held-out, which decides between equal accuracies; None where none is measured.
    """

    step: int
    figure: str
    value: float
    loss: float | None = None

    @classmethod
    def of(cls, step: int, figures: dict[str, float]) -> Best | None:
        """From an evaluation's figures; None where there is nothing to compare."""
        figure = next((name for name in FIGURES if name in figures), None)
        if figure is None or math.isnan(figures[figure]):
            return None
        return cls(step, figure, figures[figure], next((figures[name] for name in TIES if name in figures), None))

    def beats(self, other: Best | None) -> bool:
        """Whether it is truly better; the earlier of equals stays."""
        if other is None or other.figure != self.figure:
            return True
        if self.figure == "validation_loss":
            return self.value < other.value
        if self.value != other.value or self.loss is None or other.loss is None:
            return self.value > other.value
        return self.loss < other.loss


class Interval:
    """Losses and tokens of the steps since figures were logged last, and the time they took."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin with nothing."""
        self.losses: list[float] = []
        self.tokens, self.since = 0, time.monotonic()

    def add(self, stats: StepStats, batch: Batch) -> None:
        """Count a step."""
        self.losses.append(stats.loss)
        self.tokens += batch.tokens_ahead(0)

    def loss(self) -> float:
        """Mean over the steps that learned something; 0 where none did."""
        return sum(self.losses) / len(self.losses) if self.losses else 0.0

    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / max(time.monotonic() - self.since, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside out of the time."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start


class Trainer:
    """Runs optimizer steps, evaluates, checkpoints, reports; goes on from the newest whole checkpoint by itself."""

    def __init__(self, rank: Rank, engine: Engine, objective: Objective):
        self.rank, self.engine, self.objective = rank, engine, objective
        self.settings = rank.settings
        self.checkpoints = rank.folder / CHECKPOINTS
        self.history: dict[str, float] = {}
        self.best: Best | None = None
        self.health = Health(rank, engine, self.checkpoints)
        self._evaluated = True  # whether the checkpoint that training goes on from had its evaluation

    def fit(self, source: BatchSource, evaluate: Evaluate) -> dict[str, float]:
        """Train to the last step. Checkpoints are written beside it; the last one is whole when this returns.

        Returns:
            The last evaluation's figures, `train_loss` (mean of the last logged interval), and of the last step its
            layers' own losses and how evenly experts were used.
        """
        start = self._resume()
        self.health.check_start(start)
        if start and isinstance(source, SourceWithState):
            source.load_state(source_files(self.checkpoints, start))
        tracker = self._tracker(start)
        with CheckpointWriter(self.rank.mesh, self.checkpoints, keep=self.settings.keep_checkpoints) as writer:
            if not self._evaluated and self._is_better(tracker, start, source, evaluate):
                self._name_best(writer)
            interval = Interval()
            for step in range(start, self.settings.steps):
                self.rank.place.at("next batch", step + 1)
                batch, rate = source.batch(step), learning_rate(self.settings.optimizer, step, self.settings.steps)
                self.rank.place.at("forward/backward")
                self.engine.before_step(step)
                stats = NOTHING_LEARNED
                if batch is not None:
                    stats = self.engine.train_step(batch, self.objective, rate)
                    self.health.check_step(step + 1, stats, batch)
                    interval.add(stats, batch)
                self._log(tracker, step + 1, stats, rate, interval, source)
                with interval.paused():
                    self._save_and_evaluate(step + 1, source, evaluate, tracker, writer)
            self.rank.place.at("saving")
        if tracker is not None:
            tracker.finish(self.history)
        return dict(self.history)

    def _save_and_evaluate(
        self, done: int, source: BatchSource, evaluate: Evaluate, tracker: Tracker | None, writer: CheckpointWriter
    ) -> None:
        """What is due after step `done`. A checkpoint is saved first: an evaluation may fail, or be killed."""
        settings, last = self.settings, done == self.settings.steps
        saves, evaluates = (last or done % every == 0 for every in (settings.checkpoint_every, settings.eval_every))
        if saves or evaluates:
            self.health.check_weights(done)
        if saves:
            self._save(writer, done, source, evaluated=not evaluates)
        if evaluates and self._is_better(tracker, done, source, evaluate):
            if saves:
                self._name_best(writer)
            else:
                self._save(writer, done, source, evaluated=True)

    def _save(self, writer: CheckpointWriter, done: int, source: BatchSource, *, evaluated: bool) -> None:
        """`evaluated`: nothing is owed at this step; else a run that goes on from it evaluates first."""
        self.rank.place.at("saving")
        best = None if self.best is None else asdict(self.best)
        # A copy: the checkpoint is written beside training, whose later figures are none of its.
        extra = {"history": dict(self.history), "best": best, "evaluated": evaluated}
        files = source.state() if isinstance(source, SourceWithState) else {}
        writer.save(self.engine, done, extra, best=None if best is None else best["step"], source=files)

    def _name_best(self, writer: CheckpointWriter) -> None:
        assert self.best is not None
        writer.name_best(asdict(self.best))

    def _resume(self) -> int:
        """Steps taken by the newest checkpoint, which is loaded; 0 where there is none.

        Raises:
            UserError: it is damaged or of another model; names the file and says how to go on without it.
        """
        found = list_checkpoints(self.checkpoints)
        if not found:
            return 0
        self.rank.place.at("loading a checkpoint")
        try:
            saved = load_checkpoint(self.engine, found[-1])
        except UnusableCheckpoint as error:
            raise UserError(f"{error.problem}.\n{self._way_out(error)}") from error
        self.history = saved["extra"]["history"]
        best = saved["extra"]["best"]
        self.best = None if best is None or not self.settings.keep_best else Best(**best)
        self._evaluated = saved["extra"].get("evaluated", True)
        return int(saved["step"])

    def _way_out(self, error: UnusableCheckpoint) -> str:
        """What to type, with a checkpoint that is whole where there is one."""
        bad = error.path
        older = newest_whole(self.checkpoints, before=bad)
        if older is not None:
            goes_on = f"The checkpoint of step {step_of(older)} is whole. Put this one aside and go on from there"
            aside = f"mv {bad} {bad.with_name('unusable-' + bad.name)}"
        else:
            goes_on = "No older checkpoint is whole. Put them aside and start the stage from its beginning"
            aside = f"mv {bad.parent} {bad.parent.with_name('unusable-' + bad.parent.name)}"
        return f"{goes_on}:\n  {aside}\n  {self.health.resume}"

    def _tracker(self, start: int) -> Tracker | None:
        rank = self.rank
        if not rank.is_main:
            return None
        return Tracker(
            rank.folder, rank.stage, rank.config, wandb_id=rank.wandb_id, group=rank.run_name, resume_step=start,
            evaluated=self._evaluated,
        )  # fmt: skip

    def _log(
        self, tracker: Tracker | None, done: int, stats: StepStats, rate: float, interval: Interval, source: BatchSource
    ) -> None:
        """Report the interval that ends with step `done`, if one does, and begin the next."""
        if done % self.settings.log_every and done != self.settings.steps:
            return
        speed, more = interval.speed(), source.metrics()
        self.history["train_loss"] = interval.loss()
        self.history |= {name: value for name, value in stats.figures.items() if "/" not in name}
        interval.restart()
        if tracker is None:
            return
        figures = {"loss": self.history["train_loss"], "grad_norm": stats.grad_norm, "lr": rate}
        figures |= {name: value / stats.weight for name, value in stats.metrics.items()}
        figures |= stats.figures
        tracker.log(done, {f"train/{k}": v for k, v in (figures | more).items()} | {"tokens_per_second": speed})
        if self.rank.progress is not None:
            layers = {name: figures[name] for name in LOSSES if name in figures}
            self.rank.progress.update(done, loss=figures["loss"], tokens_per_second=speed, layer_losses=layers)

    def _is_better(self, tracker: Tracker | None, done: int, source: BatchSource, evaluate: Evaluate) -> bool:
        """Evaluate and take note; whether the checkpoint of this step is to be kept as the best so far."""
        self.rank.place.at("evaluating")
        figures = evaluate()
        self.history |= figures
        if tracker is not None:
            tracker.log(done, {f"eval/{name}": value for name, value in figures.items()})
        # Rank 0 decides: a figure that differs in its last bit must not make some ranks save and others not.
        found: Best | None = all_ranks_gather(self.rank.mesh, Best.of(done, figures))[0]
        resumable = done == self.settings.steps or not isinstance(source, SourceWithState) or source.resumable(done)
        if not self.settings.keep_best or not resumable or found is None or not found.beats(self.best):
            return False
        self.best = found
        return True

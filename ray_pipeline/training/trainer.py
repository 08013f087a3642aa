"""The one training loop. Stages differ in where batches come from and in the objective, not here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

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
from ray_pipeline.engine.spans import DATA
from ray_pipeline.engine.step_stats import StepStats
from ray_pipeline.errors import UserError
from ray_pipeline.objectives.base import Objective
from ray_pipeline.settings.run_folder import CHECKPOINTS, MANIFEST
from ray_pipeline.training.batch_source import BatchSource, SourceWithState
from ray_pipeline.training.best import Best
from ray_pipeline.training.guards.guards import Finding, Guards, Judge
from ray_pipeline.training.health import Health
from ray_pipeline.training.rank import Rank
from ray_pipeline.training.reporting import Reporter
from ray_pipeline.training.step_profile import StepProfile
from ray_pipeline.training.step_timeline import StepTimeline

Evaluate = Callable[[], dict[str, float]]
NOTHING_LEARNED = StepStats(loss=0.0, grad_norm=0.0, weight=1.0, metrics={})  # a step without a batch


class Trainer:
    """Runs optimizer steps, evaluates, checkpoints, reports; goes on from the newest whole checkpoint by itself."""

    def __init__(self, rank: Rank, engine: Engine, objective: Objective):
        self.rank, self.engine, self.objective = rank, engine, objective
        self.settings = rank.settings
        self.checkpoints = rank.folder / CHECKPOINTS
        self.history: dict[str, float] = {}
        self.best: Best | None = None
        self.health = Health(rank, engine, self.checkpoints)
        self.guards = Guards(rank.config.guards, rank.mesh, rank.folder, rank.stage, self.health.resume)
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
        report = Reporter(self.rank, self.engine, self.objective, start=start, evaluated=self._evaluated)
        profiles = self.rank.profile is not None
        watch = StepProfile(self.rank, self.engine) if profiles else StepTimeline(self.rank, self.engine, start)
        with CheckpointWriter(self.rank.mesh, self.checkpoints, keep=self.settings.keep_checkpoints) as writer:
            if not self._evaluated and self._is_better(report, start, source, evaluate):
                self._name_best(writer)
            report.interval.restart()
            step = start
            while step < self.settings.steps:
                watch.begin(step + 1)
                batch, rate, judge = self._next(step, source)
                stats = NOTHING_LEARNED
                if batch is not None:
                    accept = judge.accept if self.guards.skips else None
                    stats = self.engine.train_step(batch, self.objective, rate, accept)
                watch.end(step + 1, batch)
                back = self._settle(step, stats, batch, rate, judge, source, report)
                if back is not None:
                    step = self._rewind(back, source, evaluate, report, writer)
                    continue
                step += 1
                with report.interval.paused():
                    self._save_and_evaluate(step, source, evaluate, report, writer)
                    if report.stop_reason is not None and step < self.settings.steps and self._can_resume(source, step):
                        self._stop(step, source, report, writer)
            self.rank.status.at("saving")
        report.close()
        return dict(self.history)

    def _next(self, step: int, source: BatchSource) -> tuple[Batch | None, float, Judge]:
        """What optimizer step `step` (from 0) learns from, None where it is left out; its rate, and who judges it."""
        status, settings, done = self.rank.status, self.settings, step + 1
        status.at("next batch", done)
        with self.engine.span(DATA):
            batch, rate = source.batch(step), learning_rate(settings.optimizer, step, settings.steps)
        status.at("forward/backward")
        self.engine.before_step(step)
        return None if done in self.guards.left_out else batch, rate, Judge(self.guards, done)

    def _settle(
        self, step: int, stats: StepStats, batch: Batch | None, rate: float, judge: Judge, source: BatchSource,
        report: Reporter,
    ) -> Finding | None:  # fmt: skip
        """Look at step `step` (from 0) and tell of it; what was found where training is to go back for it.

        Raises:
            UserError: a guard stops the stage.
        """
        settings, done = self.settings, step + 1
        if batch is not None:
            judge.look(stats)
            if judge.stops is not None:
                stopped = self.guards.stop(judge.stops)
                self.health.check_step(done, stats, batch)  # names the likeliest cause of what is no number
                raise stopped
            if judge.skipped or judge.rewinds is not None:
                stats, batch = NOTHING_LEARNED, None
            else:
                self.health.check_step(done, stats, batch)
        report.interval.add(stats, batch)
        measured: dict[str, float] = {}
        if done % settings.log_every == 0 or done == settings.steps:
            measured = source.metrics()
            self.history |= report.step(done, stats, batch, rate, measured)
        judge.look_after(stats, measured)
        if judge.stops is not None:
            raise self.guards.stop(judge.stops)
        return judge.rewinds

    def _can_resume(self, source: BatchSource, step: int) -> bool:
        return not isinstance(source, SourceWithState) or source.resumable(step)

    def _stop(self, step: int, source: BatchSource, report: Reporter, writer: CheckpointWriter) -> None:
        """Save what step `step` left, and end the stage as was requested."""
        writer.wait()
        if not any(step_of(path) == step for path in list_checkpoints(self.checkpoints)):
            self.health.check_weights(step)
            self._save(writer, step, source, evaluated=True)
            writer.wait()
        report.close()
        raise UserError(
            f"{self.rank.stage}: saved at step {step} and stopped: {report.stop_reason}. Go on with:\n"
            f"  {self.health.resume}"
        )

    def _rewind(
        self, found: Finding, source: BatchSource, evaluate: Evaluate, report: Reporter, writer: CheckpointWriter
    ) -> int:
        """Load the newest checkpoint from before the fault began; the steps it has taken.

        Raises:
            UserError: there is none, or training went back too often.
        """
        writer.wait()
        healthy = [path for path in list_checkpoints(self.checkpoints) if step_of(path) < found.began]
        if not healthy:
            raise self.guards.stop(found, "There is no checkpoint of before to go back to.")
        self.guards.rewound(found, step_of(healthy[-1]))
        start = self._resume()
        if isinstance(source, SourceWithState):
            source.load_state(source_files(self.checkpoints, start))
        self.health.start = start
        report.go_back(start, evaluated=self._evaluated)
        if not self._evaluated and self._is_better(report, start, source, evaluate):
            self._name_best(writer)
        return start

    def _drop_spoiled(self) -> None:
        """Take their names from checkpoints that training went back behind; also after a kill halfway through."""
        if self.guards.rewinds and self.rank.is_main:
            last = self.guards.rewinds[-1]
            for path in list_checkpoints(self.checkpoints):
                if step_of(path) > last["back_to"] and (path / MANIFEST).stat().st_mtime < last["time"]:
                    path.rename(path.with_name(f".{path.name}.spoiled"))  # the writer clears such names away
        if self.guards.rewinds:
            all_ranks_gather(self.rank.mesh, None)  # nobody looks before that is done

    def _save_and_evaluate(
        self, done: int, source: BatchSource, evaluate: Evaluate, report: Reporter, writer: CheckpointWriter
    ) -> None:
        """What is due after step `done`. A checkpoint is saved first: an evaluation may fail, or be killed."""
        settings, last = self.settings, done == self.settings.steps
        saves, evaluates = (last or done % every == 0 for every in (settings.checkpoint_every, settings.eval_every))
        if saves or evaluates:
            self.health.check_weights(done)
        if saves:
            self._save(writer, done, source, evaluated=not evaluates)
        if evaluates and self._is_better(report, done, source, evaluate):
            if saves:
                self._name_best(writer)
            else:
                self._save(writer, done, source, evaluated=True)

    def _save(self, writer: CheckpointWriter, done: int, source: BatchSource, *, evaluated: bool) -> None:
        """`evaluated`: nothing is owed at this step; else a run that goes on from it evaluates first."""
        self.rank.status.at("saving")
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
        self._drop_spoiled()
        found = list_checkpoints(self.checkpoints)
        if not found:
            return 0
        self.rank.status.at("loading a checkpoint")
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

    def _is_better(self, report: Reporter, done: int, source: BatchSource, evaluate: Evaluate) -> bool:
        """Evaluate and take note; whether the checkpoint of this step is to be kept as the best so far."""
        self.rank.status.at("evaluating")
        figures = evaluate()
        self.history |= figures
        report.evaluation(done, figures)
        # Rank 0 decides: a figure that differs in its last bit must not make some ranks save and others not.
        found: Best | None = all_ranks_gather(self.rank.mesh, Best.of(done, figures))[0]
        resumable = done == self.settings.steps or self._can_resume(source, done)
        if not self.settings.keep_best or not resumable or found is None or not found.beats(self.best):
            return False
        self.best = found
        return True

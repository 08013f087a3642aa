"""Whether loss, gradients and weights are numbers that training can have, and what to type where they are not.

No checkpoint is kept of weights that blew up.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

from model.parallel.gather import all_ranks_gather
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.checkpoints.checkpoint import (
    UnusableCheckpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    step_of,
)
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.step_stats import StepStats
from ray_pipeline.errors import UserError, resume_command
from ray_pipeline.training.rank import Rank

# The largest number of half precision. Weights of models that train are a thousand times smaller, and one beyond it
# cannot be exported as f16; AdamW, which moves a weight by about its rate a step, gets there by no rate that learns.
LARGEST_WEIGHT = 65504.0
REMEMBERED = 50  # steps whose losses tell whether it rose
ROSE = 1.2  # times the lowest of them


def weights_problem(engine: Engine) -> str | None:
    """What is wrong with the weights or the optimizer's averages, over all ranks; None where all is well."""
    weight, moment = engine.largest()
    if not math.isfinite(weight):
        return "weights are not finite numbers"
    if weight > LARGEST_WEIGHT:
        return f"the largest weight is {weight:.3g}, beyond {LARGEST_WEIGHT:.0f}, the largest number of half precision"
    return None if math.isfinite(moment) else "the optimizer's averages of gradients are not finite numbers"


class Health:
    """Watches the training of one stage.

    Args:
        checkpoints: the folder of the stage's.
    """

    def __init__(self, rank: Rank, engine: Engine, checkpoints: Path):
        self.rank, self.engine, self.checkpoints = rank, engine, checkpoints
        self.start = 0
        self._losses: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def check_start(self, start: int) -> None:
        """Before the first step of this attempt, taken from the checkpoint of step `start` or from given weights.

        Raises:
            UserError: they are spoiled; names the newest checkpoint that is not.
        """
        self.start = start
        problem = weights_problem(self.engine)
        if problem is None:
            return
        if not start:
            raise UserError(
                f"{self.rank.stage}: {problem} in the model it starts from. Train the stage before it again with a "
                "lower rate, or give other weights."
            )
        bad = list_checkpoints(self.checkpoints)[-1]
        raise UserError(f"{bad}: {problem}: training had blown up before it was saved.\n{self._back_to_health(bad)}")

    def check_step(self, step: int, stats: StepStats, batch: Batch) -> None:
        """After optimizer step `step`.

        Raises:
            UserError: its loss or gradient norm is no number; with the likeliest cause, and what to type.
        """
        if math.isfinite(stats.loss) and math.isfinite(stats.grad_norm):
            self._losses.append((step, stats.loss))
            return
        what = f"the loss is {stats.loss:g} and the gradient norm {stats.grad_norm:g}"
        raise UserError(f"{self.rank.stage}: step {step}: {what}. {self._cause(step, stats, batch)}\n{self._go_on()}")

    def check_weights(self, step: int) -> None:
        """Before the weights of step `step` are kept or measured.

        Raises:
            UserError: they are spoiled.
        """
        problem = weights_problem(self.engine)
        if problem is not None:
            raise UserError(
                f"{self.rank.stage}: {problem} after step {step}, and are not saved. "
                f"The rate is the likeliest cause. {self._lower_rate()}\n{self._go_on()}"
            )

    def _cause(self, step: int, stats: StepStats, batch: Batch) -> str:
        """The likeliest cause, and what to change."""
        stage, settings = self.rank.stage, self.rank.settings
        brought = {n for n, v in batch.extras.given().items() if v.is_floating_point() and not bool(v.isfinite().all())}
        everywhere = sorted(set().union(*all_ranks_gather(self.rank.mesh, brought)))
        if everywhere:
            return (
                f"Its batch brought numbers that are not finite ({', '.join(everywhere)}), so the fault lies in what "
                "made them, not in the rate: look at the teacher, the reference or the rewards."
            )
        if math.isfinite(stats.loss) and settings.precision != "fp32":
            return (
                f"The loss is finite, so a product of the backward pass overflowed in {settings.precision}: use "
                f"--set {stage}.precision={'bf16' if settings.precision == 'fp8' else 'fp32'}."
            )
        if step == 1:
            return (
                "No step was taken before it, so the rate is not the cause: look at the weights it started from and "
                f"at what the first batch holds (inspect-batch --stage {stage})."
            )
        losses = [loss for _, loss in self._losses]
        low = min(self._losses, key=lambda entry: entry[1], default=None)
        if low is not None and losses[-1] > low[1] + (ROSE - 1) * abs(low[1]):
            last = self._losses[-1]
            rose = f"The loss had risen from {low[1]:.3g} at step {low[0]} to {last[1]:.3g} at step {last[0]}"
            return f"{rose}, so the rate is the likeliest cause. {self._lower_rate()}"
        if len(losses) < REMEMBERED // 5:
            return f"After so few steps the rate is the likeliest cause. {self._lower_rate()}"
        return (
            f"The loss had not risen before (last {losses[-1]:.3g}), so a single batch or a fault of the machine is "
            "likelier than the rate: go on and see whether it ends at the same step. If it does, look at that batch, "
            f"or lower {stage}.optimizer.grad_clip ({settings.optimizer.grad_clip:g})."
        )

    def _lower_rate(self) -> str:
        stage, optimizer = self.rank.stage, self.rank.settings.optimizer
        lower = f"--set {stage}.optimizer.lr={optimizer.lr / 3:.2g}"
        return (
            f"Lower {stage}.optimizer.lr ({optimizer.lr:g}), for example {lower}, or raise "
            f"{stage}.optimizer.warmup_steps ({optimizer.warmup_steps}); either starts the stage anew."
        )

    def _go_on(self) -> str:
        """From the newest checkpoint, or where this attempt has tried that, from the one before."""
        found = list_checkpoints(self.checkpoints)
        if not found:
            return "There is no checkpoint yet: the stage starts from its beginning."
        newest = found[-1]
        if step_of(newest) > self.start or not self.start:
            return f"The checkpoint of step {step_of(newest)} is healthy; this goes on from it:\n  {self.resume}"
        older = newest_whole(self.checkpoints, before=newest)
        tried = f"This attempt went on from the checkpoint of step {self.start}, which is healthy"
        if older is None:
            return f"{tried}, and there is no older one. With the same settings it ends the same:\n  {self.resume}"
        return f"{tried}. To go on from that of step {step_of(older)}, put it aside:\n{self._aside([newest])}"

    def _back_to_health(self, bad: Path) -> str:
        """Put aside what is spoiled, down to the newest checkpoint that is neither damaged nor spoiled."""
        aside = [bad]
        for path in reversed(list_checkpoints(self.checkpoints)[:-1]):
            try:
                load_checkpoint(self.engine, path)
            except UnusableCheckpoint:
                aside.append(path)
                continue
            if weights_problem(self.engine) is None:
                said = f"The checkpoint of step {step_of(path)} is healthy. Put what came after it aside and go on"
                return f"{said}, with a lower rate if it blows up again:\n{self._aside(aside)}"
            aside.append(path)
        said = f"No checkpoint is healthy. Put them aside and start the stage anew. {self._lower_rate()}"
        return f"{said}\n  mv {bad.parent} {bad.parent.with_name('unusable-' + bad.parent.name)}\n  {self.resume}"

    def _aside(self, paths: list[Path]) -> str:
        moves = [f"  mv {path} {path.with_name('unusable-' + path.name)}" for path in paths]
        return "\n".join([*moves, f"  {self.resume}"])

    @property
    def resume(self) -> str:
        """The command that goes on with this run."""
        return resume_command(self.rank.folder.parent)

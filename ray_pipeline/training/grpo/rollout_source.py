"""GRPO's batches: answers from a rollout engine, marked and packed; the next ones already on their way where they may
be one iteration old."""

from __future__ import annotations

import io
import time

import torch

from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.objectives.sampler_gap import SamplerGap
from ray_pipeline.rollouts.collector import Collected, Collector, Pending, is_informative
from ray_pipeline.rollouts.samplers import RolloutEngine, synchronise
from ray_pipeline.training.grpo.rollout_batch import BatchBuilder
from ray_pipeline.training.grpo.rollout_metrics import rollout_metrics
from ray_pipeline.training.rank import Rank
from ray_pipeline.training.sampling_model import SamplingModel, ShardedModel

STATE_FILE = "rollouts.pt"


class RolloutSource:
    """Samples at steps that are multiples of `steps_per_rollout`; the steps between train on the same rollouts: each
    takes the next of their `updates_per_rollout` mini-batches, `num_iterations` times round.

    The prompts of an iteration and every draw of the sampler depend on (seed, iteration, place in the order of
    prompts) and the weights alone. The trainer checkpoints between iterations only, with `state`: the place, and the
    rollouts that were sampled ahead with weights which nobody has any more. So a resumed run goes on exactly as the
    unbroken one did.

    With `rollout.max_staleness: 1` the answers of the next iteration are sampled while this one trains, by the
    weights before its updates.

    Args:
        model: the policy as it answers. sampling: what samples, with it or with weights that are sent there.
        gap: what the objective measures between the sampler's log-probabilities and the trainer's.
        left_out: prompts that are too long to be asked.
    """

    def __init__(
        self,
        rank: Rank,
        policy: Engine,
        model: SamplingModel,
        sampling: RolloutEngine,
        collector: Collector,
        builder: BatchBuilder,
        gap: SamplerGap,
        *,
        left_out: int = 0,
    ):
        self.rank, self.policy, self.model, self.sampling = rank, policy, model, sampling
        self.collector, self.builder, self.gap, self.left_out = collector, builder, gap, left_out
        self.settings = rank.config.grpo
        self.iterations = -(-self.settings.steps // self.settings.steps_per_rollout)
        self._pending: Pending | None = None
        self._ready: Collected | None = None
        self._place: int | None = None
        self._batches: list[Batch | None] = []
        self._iteration = -1
        self._figures: dict[str, float] = {}
        self._began = time.monotonic()

    def batch(self, step: int) -> Batch | None:
        """The mini-batch of an optimizer step; None where none of its answers has anything to learn from."""
        iteration, inside = divmod(step, self.settings.steps_per_rollout)
        if iteration != self._iteration:
            assert inside == 0, "resumed in the middle of a batch of rollouts"
            self._roll_out(iteration, step)
        batch = self._batches[inside % len(self._batches)]
        self._figures["untrained_step"] = float(batch is None)
        self._began = time.monotonic()
        return batch

    def metrics(self) -> dict[str, float]:
        """Figures of the latest rollouts, and of the update that was just made on them.

        `update_seconds` is the time since the batch was handed out: ask once after each update.
        """
        update = {"update_seconds": time.monotonic() - self._began}
        return self._figures | update | self.gap.figures(self.rank.mesh)

    def resumable(self, step: int) -> bool:
        """Whether `step` steps end an iteration: between two updates on the same rollouts nothing can be resumed."""
        return step % self.settings.steps_per_rollout == 0

    def state(self) -> dict[str, bytes]:
        """Files of a checkpoint that is written between two iterations. Waits for rollouts that are on their way."""
        if self._pending is not None:
            self._ready, self._pending = self.collector.collect(self._pending), None
        ahead = None if self._ready is None else self._ready.plain()
        contents = io.BytesIO()
        torch.save({"place": self._place, "ahead": ahead}, contents)
        return {STATE_FILE: contents.getvalue()}

    def load_state(self, files: dict[str, bytes]) -> None:
        """Go on from what `state` gave; also in the middle of training, whose rollouts are then forgotten."""
        self._pending, self._iteration, self._batches = None, -1, []
        saved = torch.load(io.BytesIO(files[STATE_FILE]), weights_only=True)
        self._place = saved["place"]
        self._ready = None if saved["ahead"] is None else Collected.of(saved["ahead"])

    def _roll_out(self, iteration: int, step: int) -> None:
        """Make this iteration's mini-batches, and ask for the next answers where they may be older than its weights."""
        self.rank.phase("sampling")
        collected = self._ready or self.collector.collect(self._pending or self._ask(iteration))
        assert collected.iteration == iteration, f"rollouts of iteration {collected.iteration}, not {iteration}"
        self._ready = self._pending = None
        self._place, self._iteration = collected.place, iteration
        if self.settings.rollout.max_staleness and iteration + 1 < self.iterations:
            self._pending = self._ask(iteration + 1)
        began = time.monotonic()
        self.rank.phase("training" if any(map(is_informative, collected.groups)) else "no group to learn from")
        self._batches = self.builder.build(collected.groups, step)
        self._figures = rollout_metrics(collected) | {
            "preparing_seconds": time.monotonic() - began,
            "left_out_prompts": float(self.left_out),
        }

    def _ask(self, iteration: int) -> Pending:
        place = self._place if self._place is not None else iteration * self.settings.prompts_per_step
        if not isinstance(self.model, ShardedModel):
            synchronise(self.sampling, self.policy.full_state(), iteration)
        return self.collector.ask(iteration, place)

"""From an iteration's rollouts to the mini-batches its optimizer steps train on, with their log-probabilities."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from model.attention.kinds import meets_documents_alone
from model.generate.decode import Completion
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.own_rows import own_rows
from ray_pipeline.rollouts.advantages import group_advantages
from ray_pipeline.rollouts.collector import Group, is_informative
from ray_pipeline.rollouts.packed_rows import pack_completions, row_length
from ray_pipeline.rollouts.rollout import Marked, request_seed
from ray_pipeline.settings.schema import GrpoConfig
from ray_pipeline.training.grpo.reference import Reference, logprobs_at


class BatchBuilder:
    """Packs what is worth training on: groups whose answers differ, without the answers whose rewards failed.

    Args:
        reference: None without a KL term. seq_len: the longest row. seed: of the order in which answers are cut into
            mini-batches.
    """

    def __init__(
        self,
        settings: GrpoConfig,
        engine: Engine,
        reference: Reference | None,
        seq_len: int,
        pad_id: int,
        seed: int = 0,
    ):
        self.settings, self.engine, self.reference = settings, engine, reference
        self.seq_len, self.pad_id, self.seed = seq_len, pad_id, seed

    def build(self, groups: list[Group], step: int) -> list[Batch | None]:
        """The `updates_per_rollout` mini-batches of the optimizer steps from `step` on, gone through `num_iterations`
        times; None in the place of one in which no answer trains anything.

        Each answer is in one of them. Their numbers of answers differ by at most one, whatever rows they fill.
        Extras: see `pack_completions`; "ref_logprobs" with a reference; "old_logprobs", the trainer's own before any of
        these steps, unless the policy is still the same when the step is taken, which the objective knows itself.
        """
        if self.reference is not None:
            self.reference.bring_to(step, self.engine)
        answers, count = self._answers(groups), self.settings.updates_per_rollout
        if count > 1:
            generator = torch.Generator().manual_seed(request_seed(self.seed, step, -1, 0))
            answers = [answers[i] for i in torch.randperm(len(answers), generator=generator).tolist()]
        borders = [len(answers) * i // count for i in range(count + 1)]
        parts = [answers[start:stop] for start, stop in itertools.pairwise(borders)]
        once = self.settings.num_iterations == 1
        return [self._batch(part, untouched=once and not index) for index, part in enumerate(parts)]

    def _batch(self, answers: list[tuple[Marked, float]], *, untouched: bool) -> Batch | None:
        """One mini-batch. untouched: it is trained on once, by the very policy that is there now."""
        packed = self._packed(answers)
        if packed is None:
            return None
        batch, settings = own_rows(self.engine, packed), self.settings
        if self.reference is not None:
            batch.extras.ref_logprobs = self.reference.logprobs(batch)
        if not settings.recompute_logprobs:
            batch.extras.old_logprobs, batch.extras.sampler_logprobs = batch.extras.sampler_logprobs, None
        elif not untouched:
            found = self.engine.per_token(batch, logprobs_at(settings.temperature))
            batch.extras.old_logprobs = torch.zeros(batch.labels.shape) if found is None else found
        return batch

    def _answers(self, groups: list[Group]) -> list[tuple[Marked, float]]:
        """What is worth training on, with its advantage."""
        # Advantages over all groups, so that a deviation over the batch is that of all rewards.
        advantages = self.advantages([marked for group in groups for marked in group])
        return [
            (marked, advantage)
            for group, values in zip(groups, advantages.view(len(groups), -1), strict=True)
            if is_informative(group)
            for marked, advantage in zip(group, values.tolist(), strict=True)
            if not marked.failed
        ]

    def _packed(self, answers: list[tuple[Marked, float]]) -> Batch | None:
        completions = [marked.completion for marked, _ in answers]
        trained = [one.finished or not self.settings.mask_truncated for one in completions]
        if not any(trained):
            return None
        chosen = torch.tensor([advantage for _, advantage in answers])
        masked = None if all(trained) else trained
        length, sp = self._row_length(completions), self.engine.mesh.sizes.sp
        return pack_completions(completions, chosen, length, self.pad_id, trained=masked, multiple=sp)

    def _row_length(self, completions: list[Completion]) -> int:
        model, device = self.engine.config, self.engine.device
        dtype = torch.float32 if self.settings.precision == "fp32" else torch.bfloat16
        alone = meets_documents_alone(model, self.seq_len, device, dtype)
        return row_length(completions, self.seq_len, model, 32, by_documents=alone)  # whatever the layout

    def advantages(self, marked: list[Marked]) -> Tensor:
        """Of whole groups, one after the other: [len(marked)]."""
        settings = self.settings
        return group_advantages(
            torch.tensor([one.reward for one in marked], dtype=torch.float64),
            settings.group_size,
            baseline=settings.advantages,
            scale_rewards=settings.scale_rewards,
            excluded=torch.tensor([one.failed for one in marked]),
        )

"""From an iteration's rollouts to the batch its optimizer steps train on, with the log-probabilities they need."""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.build import meets_documents_alone
from ray_pipeline.config import GrpoConfig
from ray_pipeline.data.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.rollouts.advantages import group_advantages
from ray_pipeline.rollouts.collector import Group, is_informative
from ray_pipeline.rollouts.packing import pack_rollouts, row_length
from ray_pipeline.rollouts.rollout import Rollout
from ray_pipeline.training.reference import Reference, logprobs_at


class BatchBuilder:
    """Packs what is worth training on: groups whose answers differ, without the answers whose rewards failed.

    Args:
        reference: None without a KL term. seq_len: the longest row.
    """

    def __init__(self, settings: GrpoConfig, engine: Engine, reference: Reference | None, seq_len: int, pad_id: int):
        self.settings, self.engine, self.reference = settings, engine, reference
        self.seq_len, self.pad_id = seq_len, pad_id

    def build(self, groups: list[Group], step: int) -> Batch | None:
        """The batch of the optimizer steps from `step` on; None where no answer trains anything.

        Extras: see `pack_rollouts`; "ref_logprobs" with a reference; "old_logprobs" unless they are the trainer's own
        at a single update, which the objective knows itself. Rollouts of older weights keep the sampler's: nobody else
        knows what that policy thought.
        """
        if self.reference is not None:
            self.reference.bring_to(step, self.engine)
        packed = self._packed(groups)
        if packed is None:
            return None
        batch = self.engine.fitted(packed)
        settings = self.settings
        if self.reference is not None:
            batch.extras["ref_logprobs"] = self.reference.logprobs(batch)
        if not settings.recompute_logprobs or settings.rollout.max_staleness:
            batch.extras["old_logprobs"] = batch.extras.pop("sampler_logprobs")
        elif settings.updates_per_rollout > 1:
            found = self.engine.per_token(batch, logprobs_at(settings.temperature))
            batch.extras["old_logprobs"] = torch.zeros(batch.labels.shape) if found is None else found
        return batch

    def _packed(self, groups: list[Group]) -> Batch | None:
        # Advantages over all groups, so that a deviation over the batch is that of all rewards.
        advantages = self.advantages([rollout for group in groups for rollout in group])
        pairs = [
            (rollout, advantage)
            for group, values in zip(groups, advantages.view(len(groups), -1), strict=True)
            if is_informative(group)
            for rollout, advantage in zip(group, values.tolist(), strict=True)
            if not rollout.failed
        ]
        rollouts = [rollout for rollout, _ in pairs]
        trained = [rollout.finished or not self.settings.mask_truncated for rollout in rollouts]
        if not any(trained):
            return None
        chosen = torch.tensor([advantage for _, advantage in pairs])
        masked = None if all(trained) else trained
        return pack_rollouts(rollouts, chosen, self._row_length(rollouts), self.pad_id, trained=masked)

    def _row_length(self, rollouts: list[Rollout]) -> int:
        model, device = self.engine.config, self.engine.device
        dtype = torch.float32 if self.settings.precision == "fp32" else torch.bfloat16
        alone = meets_documents_alone(model, self.seq_len, device, dtype)
        return row_length(rollouts, self.seq_len, model, 32 * self.engine.mesh.sizes.sp, by_documents=alone)

    def advantages(self, rollouts: list[Rollout]) -> Tensor:
        """Of whole groups, one after the other: [len(rollouts)]."""
        settings = self.settings
        return group_advantages(
            torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
            settings.group_size,
            baseline=settings.advantages,
            scale_rewards=settings.scale_rewards,
            excluded=torch.tensor([r.failed for r in rollouts]),
        )

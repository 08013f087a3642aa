"""Group-relative policy optimisation (arXiv:2402.03300): clipped importance ratio and k3 KL to a frozen reference.

The sum runs over completion tokens and is divided by their number over the whole batch (token-level, as in DAPO,
arXiv:2503.14476), so a long answer is not worth less per token than a short one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.loss import IGNORE, label_logprobs
from model.transformer import Transformer
from ray_pipeline.data.batch import Batch


class Grpo:
    """For batches whose extras hold `advantages`, `old_logprobs` and, if beta > 0, `ref_logprobs`, all [rows, seq]."""

    metric_names = ("policy_loss", "kl", "clipped", "logprob_gap")

    def __init__(self, *, beta: float, clip_low: float, clip_high: float, temperature: float):
        self.beta, self.clip_low, self.clip_high, self.temperature = beta, clip_low, clip_high, temperature

    def weight(self, batch: Batch) -> float:
        return float((batch.local(batch.labels) != IGNORE).sum())

    def __call__(self, model: Transformer, hidden: Tensor, embeddings: Tensor | None, batch: Batch) -> Tensor:
        labels = batch.local(batch.labels)
        mask = (labels != IGNORE).float()
        new = label_logprobs(hidden, model.lm_head, labels, self.temperature)
        old, advantages = batch.local(batch.extras["old_logprobs"]), batch.local(batch.extras["advantages"])
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        policy = -(torch.minimum(ratio * advantages, clipped * advantages) * mask).sum()
        kl = new.new_zeros(())
        if self.beta:
            log_ratio = batch.local(batch.extras["ref_logprobs"]) - new
            kl = ((log_ratio.exp() - log_ratio - 1) * mask).sum()
        outside = ((ratio * advantages > clipped * advantages).float() * mask).sum()
        gap = ((new - old).abs() * mask).sum()
        total = policy + self.beta * kl
        return torch.stack([total, policy.detach(), kl.detach(), outside.detach(), gap.detach()])

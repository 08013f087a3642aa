"""Group-relative policy optimisation (arXiv:2402.03300): clipped importance ratio and k3 KL to a reference.

What a step's token losses l are averaged to, over all its answers i of |i| trained tokens, whatever the layout:

    grpo      mean over answers of (sum of l) / |i|
    dr_grpo   mean over answers of (sum of l) / max_new_tokens                      (arXiv:2503.20783)
    dapo      (sum of all l) / (number of trained tokens)                           (arXiv:2503.14476)
    bnpo      the same: elsewhere it means over the tokens of each micro-batch, then over micro-batches, so that the
              result depends on how a step is cut; here a step is one batch, however many ranks share it

An answer that is masked as a whole trains nothing but still counts as one of the answers of grpo and dr_grpo.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from model.loss import IGNORE, label_logprobs
from model.parallel.collectives import Axis
from model.transformer import Transformer
from ray_pipeline.data.batch import Batch
from ray_pipeline.objectives.documents import count_answers, document_lengths, of_each_token, sum_documents
from ray_pipeline.objectives.sampler_gap import SamplerGap

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Level = Literal["token", "sequence"]


class Grpo:
    """For batches whose extras hold, all [rows, seq], `advantages` and:

    - `old_logprobs`, the ratio's denominator; without them it is the policy itself as it stands, and the ratio 1 with
      its gradient: what a single update on new rollouts has;
    - `ref_logprobs` if beta > 0;
    - `trained`, if some labelled tokens are not to be trained on (answers cut off, say): 1.0 for those that are;
    - `sampler_logprobs`, if `old_logprobs` are not the sampler's own: what the gap is measured to.

    A document is an answer with its prompt. Metrics are means over trained tokens where the loss is, and means over
    answers of their tokens' mean where the loss is an average of answers. `entropy` is the mean of -log p over the
    tokens that were sampled: its expectation is the policy's entropy.

    Args:
        importance_sampling_level: "sequence": one ratio for an answer, the geometric mean of its tokens' (GSPO,
            arXiv:2507.18071); its own setting is loss_type="grpo".
        max_new_tokens: of an answer; needed by dr_grpo alone.
        gap: is told how far the trainer's log-probabilities are from the sampler's.
    """

    metric_names = ("policy_loss", "kl", "clipped_low", "clipped_high", "entropy", "logprob_gap")

    def __init__(
        self,
        *,
        beta: float,
        clip_low: float,
        clip_high: float,
        temperature: float,
        loss_type: LossType = "dapo",
        importance_sampling_level: Level = "token",
        max_new_tokens: int | None = None,
        gap: SamplerGap | None = None,
    ):
        if loss_type == "dr_grpo" and not max_new_tokens:
            raise ValueError(f"max_new_tokens={max_new_tokens}: dr_grpo divides by it; give the answers' limit")
        self.beta, self.clip_low, self.clip_high, self.temperature = beta, clip_low, clip_high, temperature
        self.gap = gap
        self.by_sequence = importance_sampling_level == "sequence"
        self.by_answer = loss_type in ("grpo", "dr_grpo")
        self.divisor = max_new_tokens if loss_type == "dr_grpo" else None

    def weight(self, batch: Batch) -> float:
        return float(count_answers(batch) if self.by_answer else _trained(batch).sum())

    def __call__(self, model: Transformer, hidden: Tensor, embeddings: Tensor | None, batch: Batch) -> Tensor:
        trained = _trained(batch)
        lengths = of_each_token(document_lengths(batch, trained), batch).clamp(min=1.0)
        mask = batch.local(trained).float()
        share = mask / lengths if self.by_answer else mask
        new = label_logprobs(hidden, model.lm_head, _labels(batch, trained), self.temperature)
        given = batch.extras.get("old_logprobs")
        old = new.detach() if given is None else batch.local(given) * mask
        advantages, gap = batch.local(batch.extras["advantages"]), _gap(batch, new, old)
        if self.gap is not None:
            self.gap.observe(gap, mask)
        ratio = self._ratio(new - old, lengths, batch, model.sp)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss_share = share if self.divisor is None else mask / self.divisor
        policy = -(torch.minimum(ratio * advantages, clipped * advantages) * loss_share).sum()
        log_ratio = batch.local(batch.extras["ref_logprobs"]) * mask - new if self.beta else torch.zeros_like(new)
        kl = log_ratio.exp() - log_ratio - 1
        low, high = (ratio < 1 - self.clip_low) & (advantages < 0), (ratio > 1 + self.clip_high) & (advantages > 0)
        metrics = [(value * share).sum().detach() for value in (kl, low, high, -new, gap.abs())]
        total = policy + self.beta * (kl * loss_share).sum()
        return torch.stack([total, policy.detach(), *metrics])

    def _ratio(self, log_ratio: Tensor, lengths: Tensor, batch: Batch, sp: Axis) -> Tensor:
        """Importance ratio of every token, or of its answer: [rows, seq / sp]."""
        if self.by_sequence:
            log_ratio = of_each_token(sum_documents(log_ratio, batch, sp), batch) / lengths
        return log_ratio.exp()


def _trained(batch: Batch) -> Tensor:
    """[rows, seq] bool."""
    labelled = batch.labels != IGNORE
    return labelled & (batch.extras["trained"] > 0) if "trained" in batch.extras else labelled


def _labels(batch: Batch, trained: Tensor) -> Tensor:
    return batch.local(batch.labels.masked_fill(~trained, IGNORE))


def _gap(batch: Batch, new: Tensor, old: Tensor) -> Tensor:
    """The trainer's log-probabilities less the sampler's: [rows, seq / sp]."""
    sampled = batch.extras.get("sampler_logprobs")
    return new - old if sampled is None else old - batch.local(sampled)

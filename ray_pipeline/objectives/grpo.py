"""Group-relative policy optimisation (arXiv:2402.03300): clipped importance ratio and k3 KL to a reference.

What a step's token losses l are averaged to, over all its answers i of |i| trained tokens, whatever the layout:

    grpo      mean over answers of (sum of l) / |i|
    dr_grpo   mean over answers of (sum of l) / max_new_tokens                      (arXiv:2503.20783)
    dapo      (sum of all l) / (number of trained tokens)                           (arXiv:2503.14476)

An answer that is masked as a whole trains nothing but still counts as one of the answers of grpo and dr_grpo.

Three policies meet: the one in training, the trainer's as it stood when the answers came ("old"), and the sampler's.
The clipped ratio is training over old, the correction's weight old over sampler (arXiv:2512.02556, section 3.1, has the
masking of far off-policy answers and the KL's estimate).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from model.layers.loss import IGNORE, label_logprobs
from model.parallel.collectives import Axis
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch, required
from ray_pipeline.objectives.documents import count_answers, document_lengths, of_each_token, sum_documents
from ray_pipeline.objectives.sampler_gap import Correction, SamplerGap

LossType = Literal["grpo", "dr_grpo", "dapo"]
Level = Literal["token", "sequence"]


class Grpo:
    """For batches whose extras hold, all [rows, seq], `advantages` and:

    - `old_logprobs`, the ratio's denominator; without them it is the policy itself as it stands, and the ratio 1 with
      its gradient: what a single update on new rollouts has;
    - `ref_logprobs` if beta > 0;
    - `trained`, if some labelled tokens are not to be trained on (answers cut off, say): 1.0 for those that are;
    - `sampler_logprobs`, what the answers were sampled with: what the gap is measured to and corrected for. Without
      them `old_logprobs` are taken for the sampler's, and nothing is corrected.

    A document is an answer with its prompt. Metrics are means over trained tokens where the loss is, and means over
    answers of their tokens' mean where the loss is an average of answers. `entropy` is the mean of -log p over the
    tokens that were sampled: its expectation is the policy's entropy.

    Args:
        importance_sampling_level: "sequence": one ratio for an answer, the geometric mean of its tokens' (GSPO,
            arXiv:2507.18071); its own setting is loss_type="grpo".
        max_new_tokens: of an answer; needed by dr_grpo alone.
        correction: weighs the policy's loss of each token by the trainer's probability over the sampler's; None: not.
        off_policy_threshold: an answer with a negative advantage trains its KL alone where the sampler's log p less the
            policy's, a mean over its tokens in nats, is larger; None: every answer trains.
        unbiased_kl: the KL's estimate times the ratio, whose gradient is then that of the true KL.
        gap: is told how far the trainer's log-probabilities are from the sampler's, and of the correction's weights.
    """

    section = "grpo"
    metric_names = ("policy_loss", "kl", "clipped_low", "clipped_high", "off_policy_masked", "entropy", "logprob_gap")

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
        correction: Correction | None = None,
        off_policy_threshold: float | None = None,
        unbiased_kl: bool = True,
        gap: SamplerGap | None = None,
    ):
        if loss_type == "dr_grpo" and not max_new_tokens:
            raise ValueError(f"max_new_tokens={max_new_tokens}: dr_grpo divides by it; give the answers' limit")
        self.beta, self.clip_low, self.clip_high, self.temperature = beta, clip_low, clip_high, temperature
        self.correction = correction if correction is None or correction.mode != "none" else None
        self.off_policy_threshold, self.unbiased_kl, self.gap = off_policy_threshold, unbiased_kl, gap
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
        given, sampled = (
            None if values is None else batch.local(values) * mask
            for values in (batch.extras.old_logprobs, batch.extras.sampler_logprobs)
        )
        old = new.detach() if given is None else given
        gap = new - old if sampled is None else old - sampled
        advantages = batch.local(required(batch.extras.advantages))
        drift = (old if sampled is None else sampled) - new.detach()
        dropped = self._off_policy(drift, advantages, lengths, batch, model.sp)
        weights = self._weights(None if sampled is None else gap, mask, lengths, batch, model.sp)
        if self.gap is not None:
            self.gap.observe(gap, mask, weights)
        ratio = self._ratio(new - old, lengths, batch, model.sp)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        token_loss = -torch.minimum(ratio * advantages, clipped * advantages).masked_fill(dropped, 0.0)
        loss_share = share if self.divisor is None else mask / self.divisor
        policy = (token_loss * loss_share if weights is None else token_loss * weights[1] * loss_share).sum()
        kl = self._kl(new, ratio, batch, mask)
        low, high = (ratio < 1 - self.clip_low) & (advantages < 0), (ratio > 1 + self.clip_high) & (advantages > 0)
        metrics = [(value * share).sum().detach() for value in (kl, low, high, dropped, -new, gap.abs())]
        total = policy + self.beta * (kl * loss_share).sum()
        return torch.stack([total, policy.detach(), *metrics])

    def _kl(self, new: Tensor, ratio: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        """Estimate of KL(policy || reference) at every token, zero without beta: [rows, seq / sp]."""
        if not self.beta:
            return torch.zeros_like(new)
        log_ratio = batch.local(required(batch.extras.ref_logprobs)) * mask - new
        k3 = log_ratio.exp() - log_ratio - 1
        return k3 * ratio if self.unbiased_kl else k3

    @torch.no_grad()
    def _off_policy(self, drift: Tensor, advantages: Tensor, lengths: Tensor, batch: Batch, sp: Axis) -> Tensor:
        """Tokens of answers that are too far off to learn from what was wrong with them: [rows, seq / sp] bool."""
        if self.off_policy_threshold is None:
            return torch.zeros_like(advantages, dtype=torch.bool)
        mean = of_each_token(sum_documents(drift, batch, sp), batch) / lengths
        return (advantages < 0) & (mean > self.off_policy_threshold)

    @torch.no_grad()
    def _weights(self, gap: Tensor | None, mask: Tensor, lengths: Tensor, batch: Batch, sp: Axis) -> Tensor | None:
        """What `SamplerGap.observe` takes as `corrected`: [3, rows, seq / sp]; row 1 has the weights."""
        if self.correction is None or gap is None:
            return None
        weights, outside = self.correction.weights(gap, batch, sp)
        return torch.stack([mask / lengths if self.correction.by_answer else mask, weights, outside.float()])

    def _ratio(self, log_ratio: Tensor, lengths: Tensor, batch: Batch, sp: Axis) -> Tensor:
        """Importance ratio of every token, or of its answer: [rows, seq / sp]."""
        if self.by_sequence:
            log_ratio = of_each_token(sum_documents(log_ratio, batch, sp), batch) / lengths
        return log_ratio.exp()


def _trained(batch: Batch) -> Tensor:
    """[rows, seq] bool."""
    labelled, trained = batch.labels != IGNORE, batch.extras.trained
    return labelled if trained is None else labelled & (trained > 0)


def _labels(batch: Batch, trained: Tensor) -> Tensor:
    return batch.local(batch.labels.masked_fill(~trained, IGNORE))

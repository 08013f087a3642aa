"""Direct preference optimisation (arXiv:2305.18290): of two answers to a prompt the chosen one is made the likelier."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers.loss import IGNORE, label_logprobs
from model.parallel.collectives import Axis
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch, required
from ray_pipeline.objectives.documents import sum_over_ranks

PreferenceLoss = Literal["sigmoid", "ipo", "sigmoid_norm"]


class Dpo:
    """Sum over pairs; both answers of a pair are documents of one row. Extras, all [rows, seq]:

    - `pair`: which pair a token belongs to, counted from 0, -1 for padding. `chosen`: 1.0 in its chosen answer.
    - `ref_logprobs`: of the labels under the reference; only their sum over an answer counts.

    A pair's losses, with m the difference of its answers' log-ratios to the reference:

        sigmoid        -log sigmoid(beta m)
        sigmoid_norm   the same, log-ratios averaged over an answer's tokens
        ipo            (m - 1 / (2 beta))^2, averaged in the same way (arXiv:2310.12036)

    Metrics, to be divided by the number of pairs: `preference_accuracy`, the chosen answer is the likelier one (per
    token where the loss averages); `reward_accuracy`, its log-probability has gained more on the reference;
    `margin`, beta m of whole answers; and log-probabilities of whole answers.

    Args:
        label_smoothing: share of pairs whose answers are taken to be the wrong way round: the loss is an unbiased
            estimate of the one without such pairs (robust DPO, arXiv:2403.00409, eq. 12). Not with ipo.
    """

    section = "train"
    metric_names = ("preference_accuracy", "reward_accuracy", "margin", "chosen_logprob", "rejected_logprob")

    def __init__(self, *, loss_type: PreferenceLoss = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0):
        if label_smoothing and loss_type == "ipo":
            raise ValueError(f"label_smoothing={label_smoothing}: ipo takes no label for certain; use 0, or sigmoid")
        self.loss_type, self.beta, self.label_smoothing = loss_type, beta, label_smoothing
        self.per_token = loss_type != "sigmoid"

    def weight(self, batch: Batch) -> float:
        return float((answer_lengths(batch) > 0).all(1).sum())

    def __call__(self, model: Transformer, hidden: Tensor, embeddings: Tensor | None, batch: Batch) -> Tensor:
        labels = batch.local(batch.labels)
        new = label_logprobs(hidden, model.lm_head, labels)
        reference = batch.local(required(batch.extras.ref_logprobs)) * (labels != IGNORE)
        lengths = answer_lengths(batch)
        whole = (lengths > 0).all(1)
        policy, reference = _answers(torch.stack([new, reference], -1), batch, len(lengths), model.sp)[whole].unbind(-1)
        ratios = policy - reference
        per = lengths[whole] if self.per_token else torch.ones_like(ratios)
        losses = self._losses(_difference(ratios / per))
        gained, likelier = _difference(ratios).detach(), _difference(policy / per) > 0
        metrics = [likelier.float(), (gained > 0).float(), self.beta * gained, *policy.detach().unbind(1)]
        sums = torch.stack([losses, *metrics]).sum(1)
        return sums * float(model.sp.index == 0)  # all ranks of a sequence know its pairs; one counts them

    def _losses(self, margins: Tensor) -> Tensor:
        if self.loss_type == "ipo":
            return (margins - 1 / (2 * self.beta)).square()
        right, wrong = -F.logsigmoid(self.beta * margins), -F.logsigmoid(-self.beta * margins)
        smoothing = self.label_smoothing
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing) if smoothing else right


def _difference(values: Tensor) -> Tensor:
    """Chosen less rejected: [pairs, 2] -> [pairs]."""
    return values[:, 0] - values[:, 1]


def answer_places(batch: Batch) -> Tensor:
    """Each token's row in a table of answers, two for a pair, chosen before rejected: [rows, seq]."""
    return (2 * required(batch.extras.pair) + 1 - required(batch.extras.chosen)).long().clamp(min=0)


def answer_lengths(batch: Batch) -> Tensor:
    """Labelled tokens of each answer [pairs, 2]; whole rows are known to every rank."""
    labelled = (batch.labels != IGNORE).float().flatten()
    pairs = max(int(required(batch.extras.pair).max()) + 1, 1)
    return labelled.new_zeros(2 * pairs).index_add(0, answer_places(batch).flatten(), labelled).view(-1, 2)


def _answers(values: Tensor, batch: Batch, pairs: int, sp: Axis) -> Tensor:
    """Sums over each answer of values that are zero outside of answers: [rows, seq / sp, n] -> [pairs, 2, n]."""
    table = values.new_zeros(2 * pairs, values.shape[-1])
    table = table.index_add(0, batch.local(answer_places(batch)).flatten(), values.flatten(0, 1))
    return sum_over_ranks(table, sp).view(pairs, 2, -1)

"""Next-token cross-entropy with multi-token prediction (DeepSeek-V3, arXiv:2412.19437, eqs. 24-25)."""

from __future__ import annotations

import torch
from torch import Tensor

from model.layers.loss import IGNORE, cross_entropy_sum, shifted_labels
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch


class CrossEntropy:
    """Sum over labelled tokens of -log p, plus `mtp_weight` times the mean over depths of the MTP modules' sums."""

    section = "train"
    metric_names = ("cross_entropy", "mtp/cross_entropy", "mtp/tokens")

    def __init__(self, mtp_weight: float = 0.0):
        self.mtp_weight = mtp_weight

    def weight(self, batch: Batch) -> float:
        return float((batch.local(batch.labels) != IGNORE).sum())

    def __call__(self, model: Transformer, hidden: Tensor, embeddings: Tensor | None, batch: Batch) -> Tensor:
        main = cross_entropy_sum(hidden, model.lm_head, batch.local(batch.labels))
        ahead, tokens = main.new_zeros(()), 0
        depths = len(model.mtp)
        if depths and (self.mtp_weight or not torch.is_grad_enabled()):
            assert embeddings is not None
            states = model.predict_ahead(hidden, embeddings, batch.doc_ids, batch.real)
            for depth, state in enumerate(states, start=1):
                labels = batch.local(shifted_labels(batch.labels, batch.doc_ids, depth))
                ahead = ahead + cross_entropy_sum(state, model.lm_head, labels)
                tokens += int((labels != IGNORE).sum())
        total = main + self.mtp_weight / max(depths, 1) * ahead
        return torch.stack([total, main.detach(), ahead.detach(), main.new_tensor(float(tokens))])

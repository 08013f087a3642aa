"""Forward KL from a teacher's distribution over the next token (arXiv:1503.02531)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers.vocab import Head
from model.loss import IGNORE, log_softmax, negative_log_likelihood
from model.parallel.collectives import reduce_from
from model.transformer import Transformer
from ray_pipeline.data.batch import Batch


class ForwardKl:
    """Sum over labelled tokens of KL(teacher || student) at `temperature`, times temperature squared.

    The batch brings the teacher's final hidden states (`teacher_hidden`, [rows, seq, teacher hidden_size]), not its
    logits: those would be vocab_size wide for every token of the step at once.
    """

    metric_names = ("kl", "cross_entropy")

    def __init__(self, temperature: float, teacher_head: Head | None):
        self.temperature, self.teacher_head = temperature, teacher_head

    def weight(self, batch: Batch) -> float:
        return float((batch.local(batch.labels) != IGNORE).sum())

    def __call__(self, model: Transformer, hidden: Tensor, embeddings: Tensor | None, batch: Batch) -> Tensor:
        assert self.teacher_head is not None
        labels = batch.local(batch.labels)
        kept = labels != IGNORE
        axis = model.lm_head.tp
        student_logits = model.lm_head(hidden[kept]).float()
        with torch.no_grad():
            teacher_hidden = batch.local(batch.extras["teacher_hidden"])[kept]
            teacher = log_softmax(self.teacher_head(teacher_hidden).float() / self.temperature, axis)
        student = log_softmax(student_logits / self.temperature, axis)
        kl = F.kl_div(student, teacher, log_target=True, reduction="sum") * self.temperature**2
        kl = reduce_from(kl, axis)
        ce = negative_log_likelihood(student_logits.detach(), labels[kept], axis).sum()
        return torch.stack([kl, kl.detach(), ce])

"""Forward KL from a teacher's distribution over the next token (arXiv:1503.02531)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.loss import IGNORE
from model.transformer import Transformer
from ray_pipeline.data.batch import Batch


class ForwardKl:
    """Sum over labelled tokens of KL(teacher || student) at `temperature`, times temperature squared.

    The batch brings the teacher's final hidden states (`teacher_hidden`, [rows, seq, teacher hidden_size]), not its
    logits: those would be vocab_size wide for every token of the step at once.
    """

    metric_names = ("kl", "cross_entropy")

    def __init__(self, temperature: float, teacher_head: Tensor | None):
        self.temperature, self.teacher_head = temperature, teacher_head

    def weight(self, batch: Batch) -> float:
        return float((batch.labels != IGNORE).sum())

    def __call__(self, model: Transformer, hidden: Tensor, embeddings: Tensor | None, batch: Batch) -> Tensor:
        assert self.teacher_head is not None
        kept = batch.labels != IGNORE
        student_logits = F.linear(hidden[kept], model.lm_head.weight).float()
        with torch.no_grad():
            teacher_logits = F.linear(batch.extras["teacher_hidden"][kept], self.teacher_head).float()
            teacher = F.log_softmax(teacher_logits / self.temperature, -1)
        student = F.log_softmax(student_logits / self.temperature, -1)
        kl = F.kl_div(student, teacher, log_target=True, reduction="sum") * self.temperature**2
        ce = F.cross_entropy(student_logits.detach(), batch.labels[kept], reduction="sum")
        return torch.stack([kl, kl.detach(), ce])

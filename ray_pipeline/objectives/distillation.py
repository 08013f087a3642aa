"""Learning a teacher's distribution over the next token (arXiv:1503.02531), and its hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.operations import product
from model.layers.chunked_loss import ChunkLoss
from model.layers.linear import operand_dtype
from model.layers.loss import IGNORE
from model.layers.vocab import Head
from model.parallel.collectives import Axis
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch, Extras, required
from ray_pipeline.objectives.base import Objective
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.objectives.divergence import Divergence, TopKTeacher, WholeTeacher
from ray_pipeline.settings.schema import DistillationConfig

BETAS = {"forward_kl": 0.0, "hidden": 0.0, "reverse_kl": 1.0}


class Distillation:
    """Sum over labelled tokens of a divergence, plus `hidden_weight` times the squared error of final hidden states.

    The batch brings one of two things. `teacher_hidden` [rows, seq, teacher hidden_size] are the teacher's final hidden
    states, not its logits: those would be vocab_size wide for every token of the step at once. `teacher_topk_ids` and
    `teacher_topk_logprobs` [rows, seq, k] are its likeliest tokens, at the divergence's temperature.

    Args:
        hidden_weight: of the squared error's mean over dimensions; needs `teacher_hidden` as wide as the student's.
        teacher_head: of the teacher whose hidden states the batch brings; cut as the student's, or whole.
    """

    section = "train"
    metric_names = ("divergence", "cross_entropy", "hidden_error")

    def __init__(self, divergence: Divergence, *, hidden_weight: float = 0.0, teacher_head: Head | None = None):
        self.divergence, self.hidden_weight, self.teacher_head = divergence, hidden_weight, teacher_head

    def weight(self, batch: Batch) -> float:
        return float((batch.local(batch.labels) != IGNORE).sum())

    def __call__(self, model: Transformer, hidden: Tensor, embeddings: Tensor | None, batch: Batch) -> Tensor:
        labels = batch.local(batch.labels)
        kept = labels != IGNORE
        student = hidden[kept]
        teacher = batch.extras.each(lambda values: batch.local(values)[kept])
        chunk_loss = self._chunk_loss(teacher, labels[kept], model.lm_head.tp)
        loss, cross_entropy = model.lm_head.chunked_sums(student, chunk_loss)
        error = torch.zeros_like(loss)
        if self.hidden_weight:
            error = (student.float() - required(teacher.teacher_hidden).float()).square().mean(-1).sum()
        total = loss + self.hidden_weight * error
        return torch.stack([total, loss.detach(), cross_entropy.detach(), error.detach()])

    def _chunk_loss(self, teacher: Extras, labels: Tensor, axis: Axis) -> ChunkLoss:
        if teacher.teacher_topk_ids is not None:
            ids, logprobs = teacher.teacher_topk_ids.long(), required(teacher.teacher_topk_logprobs).float()
            return TopKTeacher(self.divergence, ids, logprobs, labels, axis)
        assert self.teacher_head is not None, "a batch without the teacher's top-k needs its head"
        states = required(teacher.teacher_hidden)
        dtype = operand_dtype(states)
        hidden, weight = states.to(dtype), self._teacher_slice(axis).to(dtype)
        return WholeTeacher(self.divergence, lambda rows: product(hidden[rows], weight.t()), labels, axis)

    def _teacher_slice(self, axis: Axis) -> Tensor:
        """The rows of the teacher's head for this rank's part of the vocabulary."""
        assert self.teacher_head is not None
        weight = self.teacher_head.weight.detach()
        return weight if self.teacher_head.tp.size == axis.size else weight.chunk(axis.size)[axis.index]


def distillation_objective(settings: DistillationConfig, teacher_head: Head | None) -> Objective:
    """What `distillation.loss` names.

    Args:
        teacher_head: where this rank has it; None without the last part of the model, and for a file of top-k.
    """
    if settings.loss == "cross_entropy":
        return CrossEntropy()
    beta = settings.jsd_beta if settings.loss == "jsd" else BETAS[settings.loss]
    return Distillation(
        Divergence(beta, settings.temperature),
        hidden_weight=settings.hidden_weight if settings.loss == "hidden" else 0.0,
        teacher_head=teacher_head,
    )

"""How far a student's distribution over the next token is from a teacher's, a few rows of logits at a time.

A loss here is a function of probabilities s of outcomes: the vocabulary's entries, or a teacher's k likeliest and all
others as one. With h = s * dloss/ds, up to a multiple of s, its gradient by the logits is h - s * sum(h).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, log1p

import torch
import torch.distributed as dist
from torch import Tensor

from model.layers.block_loss import in_blocks, loss_of_logits
from model.parallel.collectives import Axis, all_reduce

# Mass of the outcomes that a top-k list leaves out: as little as fp32 can tell from none.
LEAST_REST = 1e-7


@dataclass(frozen=True)
class Divergence:
    """beta * KL(teacher || m) + (1 - beta) * KL(student || m) with m = beta * teacher + (1 - beta) * student
    (generalised Jensen-Shannon, arXiv:2306.13649, eq. 1); forward KL for beta 0 and reverse KL for beta 1.

    Both distributions are taken at `temperature`, and the loss times its square, so that gradients keep their size
    (arXiv:1503.02531, §2).
    """

    beta: float
    temperature: float = 1.0

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            student, teacher: log-probabilities [rows, outcomes].
        Returns:
            The loss of each row [rows], without the temperature's square, and h [rows, outcomes].
        """
        if self.beta == 0:
            p = teacher.exp()
            return (teacher - student).mul_(p).sum(-1), p.neg_()
        if self.beta == 1:
            h = (student - teacher).mul_(student.exp())
            return h.sum(-1), h
        mixture = torch.logaddexp(student + log1p(-self.beta), teacher + log(self.beta))
        of_teacher = (teacher - mixture).mul_(teacher.exp()).sum(-1)
        h = mixture.neg_().add_(student).mul_(student.exp()).mul_(1 - self.beta)
        return self.beta * of_teacher + h.sum(-1), h


def _normalise(logits: Tensor, axis: Axis) -> Tensor:
    """In place: log-probabilities of this rank's slice of the vocabulary, [rows, vocab_size / tp]."""
    logits -= all_reduce(logits.amax(-1, keepdim=True), axis, dist.ReduceOp.MAX)
    logits -= all_reduce(logits.exp().sum(-1, keepdim=True), axis).log_()
    return logits


class WholeTeacher:
    """The teacher's distribution over the whole vocabulary. Sums: divergence, and cross-entropy with the labels.

    Args:
        logits: rows -> the teacher's logits of them, [chunk, vocab_size / tp]; made when they are needed, and
            overwritten.
        labels: [rows]. axis: over which the vocabulary is cut, the teacher's in the same way as the student's.
    """

    count = 2

    def __init__(self, divergence: Divergence, logits: Callable[[slice], Tensor], labels: Tensor, axis: Axis):
        self.divergence, self.logits, self.labels, self.axis = divergence, logits, labels, axis

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        teacher, temperature = self.logits(rows), self.divergence.temperature
        sums = torch.zeros(self.count, device=logits.device)

        def block(exact: Tensor, inside: slice) -> Tensor | None:
            cross_entropy = loss_of_logits(exact, self.labels[rows][inside], self.axis).sum()
            student = _normalise(exact.div_(temperature), self.axis)
            values, h = self.divergence(student, _normalise(teacher[inside].float().div_(temperature), self.axis))
            sums.add_(torch.stack([all_reduce(values.sum(), self.axis) * temperature**2, cross_entropy]))
            if not with_gradient:
                return None
            whole = all_reduce(h.sum(-1, keepdim=True), self.axis)
            return h.sub_(student.exp_().mul_(whole)).mul_(temperature)

        in_blocks(logits, self.axis, block)
        return sums, logits if with_gradient else None


class TopKTeacher:
    """The teacher's k likeliest tokens and, as one outcome more, all others together.

    That is never more than the divergence of the whole distributions, and zero only where these k + 1 agree; a list
    that was scaled up to one instead would teach the student never to say anything else. Sums as of `WholeTeacher`.

    Args:
        ids: [rows, k], different ones. logprobs: [rows, k], at the divergence's temperature.
        labels: [rows]. axis: over which the student's vocabulary is cut.
    """

    count = 2

    def __init__(self, divergence: Divergence, ids: Tensor, logprobs: Tensor, labels: Tensor, axis: Axis):
        self.divergence, self.ids, self.labels, self.axis = divergence, ids, labels, axis
        rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST).log()
        self.teacher = torch.cat([logprobs, rest], -1)

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        sums, temperature = torch.zeros(self.count, device=logits.device), self.divergence.temperature

        def block(exact: Tensor, inside: slice) -> Tensor | None:
            cross_entropy = loss_of_logits(exact, self.labels[rows][inside], self.axis).sum()
            student = _normalise(exact.div_(temperature), self.axis)
            loss, gradient = self._divergence(
                student, self.ids[rows][inside], self.teacher[rows][inside], with_gradient
            )
            sums.add_(torch.stack([loss * temperature**2, cross_entropy]))
            return None if gradient is None else gradient.mul_(temperature)

        in_blocks(logits, self.axis, block)
        return sums, logits if with_gradient else None

    def _divergence(
        self, student: Tensor, ids: Tensor, teacher: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of log-probabilities [rows, vocab_size / tp], at the temperature; its gradient by the logits there."""
        width, probabilities = student.shape[1], student.exp()
        column = ids - self.axis.index * width
        outside = (column < 0) | (column >= width)
        column = column.masked_fill(outside, width)  # past the end, in a column that is cut off
        named = student.new_zeros(len(student), width + 1).scatter_(1, column, 1.0)[:, :width].bool()
        listed = student.gather(1, column.clamp(max=width - 1)).masked_fill(outside, 0.0)
        listed = all_reduce(listed, self.axis)
        rest = all_reduce(probabilities.masked_fill(named, 0.0).sum(-1, keepdim=True), self.axis).clamp(min=LEAST_REST)
        values, h = self.divergence(torch.cat([listed, rest.log()], -1), teacher)
        if not with_gradient:
            return values.sum(), None
        # Each of the others has its share of the outcome they are together.
        of_others = torch.where(named, 0.0, h[:, -1:] / rest)
        of_listed = student.new_zeros(len(student), width + 1).scatter_(1, column, h[:, :-1])[:, :width]
        return values.sum(), of_listed + probabilities * (of_others - h.sum(-1, keepdim=True))

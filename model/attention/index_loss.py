"""What trains the indexer of sparse attention: to score tokens as the main attention weighs them.

The loss is the divergence of the indexer's softmax from the attention distribution, over the tokens that attention
reads (DeepSeek-V3.2, arXiv:2512.02556, §2.1.1: over all of them in the dense warm-up, eq. 3; over the selected ones in
sparse training, eq. 4). Only the indexer gets a gradient. It is computed block by block in the forward pass, because
attention over whole rows with all heads would not fit: what is kept are the gradients of queries, keys and weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from model.attention.indexer import BLOCK, index_scores
from model.layers.linear import without_autocast
from model.parallel.collectives import Axis, all_reduce, all_to_all_rows

Index = tuple[Tensor, Tensor, Tensor]  # queries, keys, weights: what `Indexer.forward` gives


def indexer_kl(
    index: Index,
    q: Tensor,
    k: Tensor,
    read: Tensor,
    scale: float,
    *,
    tp: Axis,
    sp: Axis,
    counted: Tensor | None = None,
) -> Tensor:
    """Sum over this rank's positions of KL(attention || softmax of index scores), a scalar.

    Args:
        index: queries and weights of this rank's positions, keys of whole rows.
        q, k: of the main attention, [batch, seq, heads / (tp * sp), qk_head_dim].
        read: bool [batch or 1, seq, seq], the keys each query attends to; at least one.
        scale: of the main attention's scores.
        counted: bool [batch, seq / sp], False for padding, which is left out; None: all are tokens.
    """
    with torch.no_grad(), without_autocast(q):
        total, gradients = _total_and_gradients(index, q, k, read, scale, tp, sp, counted)
    loss: Tensor = _Ready.apply(total, *gradients, *index)
    return loss


def _total_and_gradients(
    index: Index, q: Tensor, k: Tensor, read: Tensor, scale: float, tp: Axis, sp: Axis, counted: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients with respect to `index`."""
    (batch, seq, heads, _), window = q.shape, index[0].shape[1]
    gradients = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in index]
    total = torch.zeros((), device=q.device)
    rows = max(1, BLOCK // (batch * max(heads * sp.size, index[0].shape[2]) * seq))
    for begin in range(0, window, rows):
        end = min(begin + rows, window)
        target = _attention(q, k, read, scale, slice(begin, end), sp)
        all_reduce(target, tp)
        target /= target.sum(-1, keepdim=True)
        seen = sp.index * window + end
        mine = read[:, seen - end + begin : seen, :seen]
        parts = [index[0][:, begin:end], index[1][:, :seen], index[2][:, begin:end]]
        leaves = [part.detach().requires_grad_() for part in parts]
        # A checkpointed layer keeps what its forward saves in its own way: this graph is none of its business.
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            each = _divergences(target[:, :, :seen], index_scores(*leaves), mine)
            loss = (each if counted is None else each * counted[:, begin:end, None]).sum()
        total += loss.detach()
        places = (gradients[0][:, begin:end], gradients[1][:, :seen], gradients[2][:, begin:end])
        for place, gradient in zip(places, torch.autograd.grad(loss, leaves), strict=True):
            place += gradient
    return total, [g.to(tensor.dtype) for g, tensor in zip(gradients, index, strict=True)]


def _attention(q: Tensor, k: Tensor, read: Tensor, scale: float, block: slice, sp: Axis) -> Tensor:
    """Attention weights of a block of this rank's positions, summed over heads but for those of other tp ranks.

    Under sequence parallelism a rank has some heads of every position: it computes the same block of every rank's
    window, and each rank collects its own.

    Returns:
        fp32 [batch, rows of the block, keys]: keys up to the last that any rank's block may read.
    """
    window = q.shape[1] // sp.size
    seen = (sp.size - 1) * window + block.stop
    mine = q.unflatten(1, (sp.size, window))[:, :, block].flatten(1, 2)  # [batch, sp * rows, heads, width]
    hidden = ~read.unflatten(1, (sp.size, window))[:, :, block, :seen].flatten(1, 2)
    scores = torch.matmul(mine.transpose(1, 2), k[:, :seen].permute(0, 2, 3, 1)).float() * scale
    summed = scores.masked_fill_(hidden.unsqueeze(1), -torch.inf).softmax(-1).sum(1)
    each = [1] * sp.size
    for_ranks = summed.unflatten(1, (sp.size, -1)).movedim(1, 0)  # [sp, batch, rows, keys]
    return all_to_all_rows(for_ranks.contiguous(), each, each, sp).sum(0)


def _divergences(target: Tensor, scores: Tensor, read: Tensor) -> Tensor:
    """Terms of KL(target || softmax of scores over the keys that are read): [batch, rows, keys] -> same."""
    logprobs = scores.masked_fill(~read, -torch.inf).log_softmax(-1).masked_fill(~read, 0.0)
    return torch.xlogy(target, target) - target * logprobs  # term by term: the sums are nearly equal


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Ready(torch.autograd.Function):
    """A scalar whose gradients with respect to three tensors are known already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:3])
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *(grads[0] * gradient for gradient in ctx.saved_tensors))

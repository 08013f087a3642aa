"""DeepSeekMoE (arXiv:2401.06066): shared experts see every token, routed experts the tokens sent to them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.feed_forward import FeedForward
from model.layers.linear import operand_dtype, weight_gradient_queue
from model.layers.product import by_onednn, product, transposed_product
from model.layers.swiglu import swiglu
from model.moe.router import Router
from model.moe.rows import Plan, collect, plan_rows, spread, spread_scales, sum_of_choices
from model.parallel.collectives import LOCAL, Axis, all_to_all_rows, collective, copy_to, reduce_from
from model.processor import LEAST

ROW_MULTIPLE = 64


class _GroupedLinear(torch.autograd.Function):
    """y[rows of expert e] = x[rows of expert e] @ weight[e].T, rows sorted by expert.

    One node instead of one per expert: autograd's bookkeeping would otherwise cost more than small experts' matmuls,
    and each expert's weight gradient is written straight into its place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: Groups, plan: Plan | None, owner: tuple[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.plan, ctx.owner = groups, plan, owner
        return _products(_rows(x, plan), weight.transpose(1, 2), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, groups, plan = grads[0].contiguous(), ctx.groups, ctx.plan
        need_input, need_weight, *_ = ctx.needs_input_grad
        dx = _products(grad, weight, groups) if need_input else None
        if dx is not None and plan is not None:
            dx = sum_of_choices(dx, plan.place)
        if not need_weight:
            return dx, *(None,) * 4
        queue = weight_gradient_queue()
        if queue is None:
            return dx, _weight_gradient(grad, _rows(x, plan), groups), *(None,) * 3
        queue.add(ctx.owner[0], lambda: _weight_gradient(grad, _rows(x, plan), groups))
        return dx, *(None,) * 4


def _rows(x: Tensor, plan: Plan | None) -> Tensor:
    """What experts read: gathered once more in backward, as there are several rows of a token to keep."""
    return x if plan is None else x.index_select(0, plan.source)


Groups = list[int] | Tensor
"""Rows of each expert, or int32 [experts] where each one's rows end, which selects the GPU's grouped kernel."""


def _products(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """[rows, a] x [experts, a, b] -> [rows, b]."""
    if isinstance(groups, Tensor):
        return F.grouped_mm(x, matrices, offs=groups)
    y = x.new_empty(x.shape[0], matrices.shape[2])
    for rows, out, matrix in zip(x.split(groups), y.split(groups), matrices.unbind(0), strict=True):
        product(rows, matrix, out)
    return y


def _weight_gradient(grad: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """[rows, out], [rows, in] -> [experts, out, in]."""
    if isinstance(groups, Tensor):
        return F.grouped_mm(grad.t(), x, offs=groups)
    dweight = x.new_empty(len(groups), grad.shape[1], x.shape[1])
    for g, rows, out in zip(grad.split(groups), x.split(groups), dweight.unbind(0), strict=True):
        transposed_product(g, rows, out)
    return dweight


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, plan: Plan | None = None) -> Tensor:
    """Apply expert e's weight to its rows.

    Args:
        x: [rows, in], sorted by expert; with a plan [tokens, in], which it spreads. weight: [experts, out, in].
        counts: [experts] rows of each expert.
    """
    parameter, dtype = weight, operand_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    groups: Groups
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        groups = counts.cumsum(0).to(torch.int32)
    else:
        groups = counts.tolist()
    return _GroupedLinear.apply(x, weight, groups, plan, (parameter,))


def row_multiple(x: Tensor, matrix: int, rows: float) -> int:
    """What every expert's number of rows is rounded up to.

    oneDNN compiles a kernel for each number of rows, and routing makes new ones at every step: in bf16 that is five
    times slower on a CPU than a few sizes that repeat.

    Args:
        matrix: elements of an expert's larger matrix. rows: what an expert gets on average.
    """
    if x.device.type != "cpu":
        return 1
    onednn = operand_dtype(x) == torch.bfloat16 or (by_onednn(x) and rows * matrix >= LEAST)
    return ROW_MULTIPLE if onednn else 1


class RoutedExperts(nn.Module):
    """The routed experts' weights, stacked as Hugging Face stacks them (gate rows first).

    Experts are cut over ep, each one's inner features over tp. `product` is (rows sorted by expert, weight parameter,
    rows of each expert) -> output, or (tokens, weight parameter, rows of each expert, how they are spread) -> output.
    """

    ep: Axis = LOCAL
    product: Callable[..., Tensor] = staticmethod(grouped_linear)

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of chosen experts; nothing is dropped. x [tokens, hidden]; others [tokens, k]."""
        if self.ep.size == 1:
            return self._compute(x, indices, weights).to(x.dtype)
        return self._elsewhere(x, indices, weights).to(x.dtype)

    def _compute(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """My experts, by their numbers here: x [tokens, hidden]; others [tokens, k] -> [tokens, hidden]."""
        experts, *matrix = self.gate_up_proj.shape
        plan = plan_rows(indices, experts, row_multiple(x, prod(matrix), indices.numel() / experts))
        gate_up = self.product(x, self.gate_up_proj, plan.counts, plan)
        # The routing weight multiplies the narrow inner activation, not the wide output: same product, less work.
        inner = swiglu(gate_up, spread_scales(weights, plan))
        return collect(self.product(inner, self.down_proj, plan.counts), plan)

    def _elsewhere(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Send every row to the rank that holds its expert, compute there, and bring the results back in order."""
        experts = self.gate_up_proj.shape[0]
        plan = plan_rows(indices, experts * self.ep.size)
        arriving = torch.empty_like(plan.counts)
        with collective(self.ep, "all-to-all"):
            dist.all_to_all_single(arriving, plan.counts, group=self.ep.group)
        by_rank = (self.ep.size, experts)
        sent, received = plan.counts.view(by_rank).sum(1).tolist(), arriving.view(by_rank).sum(1).tolist()
        rows = all_to_all_rows(spread(x, plan), received, sent, self.ep)
        scales = all_to_all_rows(spread_scales(weights, plan), received, sent, self.ep)
        # What arrives is sorted by sender, then expert.
        expert = torch.arange(experts, device=rows.device).repeat(self.ep.size).repeat_interleave(arriving)
        out = self._compute(rows, expert.unsqueeze(1), scales)
        return collect(all_to_all_rows(out, sent, received, self.ep), plan)


class MixtureOfExperts(nn.Module):
    """[batch, seq, hidden_size] -> same: routed experts plus shared experts (eq. 12)."""

    tp: Axis = LOCAL

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = RoutedExperts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = FeedForward(config.hidden_size, width) if width else None

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """
        Args:
            routing: [batch, seq, num_experts_per_tok] experts to use where they are not FREE.
        """
        tokens = x.flatten(0, -2)
        given = None if routing is None else routing.flatten(0, -2)
        indices, weights = self.gate(tokens, rows=x.shape[0], given=given)
        entered = copy_to(tokens, self.tp)  # once for routed and shared experts: one message backward
        out = self.experts(entered, indices, copy_to(weights, self.tp)).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts.partial(x if entered is tokens else entered.view_as(x))
        return reduce_from(out, self.tp)

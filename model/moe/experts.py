"""DeepSeekMoE (arXiv:2401.06066): shared experts see every token, routed experts the tokens sent to them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels import operations
from model.kernels.cpu.products import row_multiple
from model.kernels.rows import collect, plan_rows, spread, spread_scales
from model.kernels.swiglu import scaled_swiglu
from model.kernels.weight_gradients import BackwardSplit
from model.layers.auxiliary import EVERY_TOKEN, Counting
from model.layers.feed_forward import FeedForward
from model.layers.linear import as_operand
from model.moe.router import Router
from model.parallel.collectives import LOCAL, Axis, all_to_all_rows, collective, copy_to, reduce_from


class RoutedExperts(nn.Module):
    """The routed experts' weights, stacked as Hugging Face stacks them (gate rows first).

    Experts are cut over ep, each one's inner features over tp.

    Attributes:
        product: another matrix product, (rows sorted by expert, weight parameter, rows of each expert, backward_split)
            -> output.
        backward_split: lets weight gradients be computed later.
    """

    ep: Axis = LOCAL
    product: Callable[[Tensor, Tensor, Tensor, BackwardSplit | None], Tensor] | None = None
    backward_split: BackwardSplit | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of chosen experts; nothing is dropped. x [tokens, hidden]; others [tokens, k]."""
        if self.ep.size == 1:
            return self._compute(x, indices, weights)
        return self._elsewhere(x, indices, weights)

    def _compute(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """My experts, by their numbers here: x [tokens, hidden]; others [tokens, k] -> [tokens, hidden]."""
        x, (experts, *matrix) = as_operand(x), self.gate_up_proj.shape
        plan = plan_rows(indices, experts, row_multiple(x, prod(matrix), indices.numel() / experts))
        if self.product is None:
            return operations.experts(x, self.gate_up_proj, self.down_proj, weights, plan, self.backward_split)
        gate_up = self.product(spread(x, plan), self.gate_up_proj, plan.counts, self.backward_split)
        # The routing weight multiplies the narrow inner activation, not the wide output: same product, less work.
        inner = scaled_swiglu(gate_up, spread_scales(weights, plan))
        return collect(self.product(inner, self.down_proj, plan.counts, self.backward_split), plan)

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

    def forward(self, x: Tensor, routing: Tensor | None = None, counting: Counting = EVERY_TOKEN) -> Tensor:
        """
        Args:
            routing: [batch, seq, num_experts_per_tok] experts to use where they are not FREE.
            counting: what the router counts.
        """
        tokens = x.flatten(0, -2)
        given = None if routing is None else routing.flatten(0, -2)
        indices, weights = self.gate(tokens, rows=x.shape[0], given=given, counting=counting)
        entered = copy_to(as_operand(tokens), self.tp)  # once for routed and shared experts: one message backward
        out = self.experts(entered, indices, copy_to(weights, self.tp)).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts.partial(entered.view_as(x))
        return reduce_from(out, self.tp)

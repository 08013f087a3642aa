"""DeepSeekMoE (arXiv:2401.06066): shared experts see every token, routed experts the tokens sent to them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
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
from model.moe.dispatch import Hop, Tokens, plan_present, round_gradients, round_tokens, through
from model.moe.router import Router
from model.parallel.collectives import LOCAL, Arrivals, Axis, copy_to, reduce_from


class RoutedExperts(nn.Module):
    """The routed experts' weights, stacked as Hugging Face stacks them (gate rows first).

    Experts are cut over ep, each one's inner features over tp.

    Attributes:
        ep_near, ep_far: the way to experts, within a node and between nodes (`MeshSizes.dispatch_groups`).
        fp8_dispatch: tokens go there, and gradients of results, in 8 bits (arXiv:2412.19437, §3.3.3).
        product: another matrix product, (rows sorted by expert, weight parameter, rows of each expert, backward_split)
            -> output.
        backward_split: lets weight gradients be computed later.
    """

    ep: Axis = LOCAL
    tp: Axis = LOCAL
    ep_near: Axis = LOCAL
    ep_far: Axis = LOCAL
    fp8_dispatch: bool = False
    product: Callable[[Tensor, Tensor, Tensor, BackwardSplit | None], Tensor] | None = None
    backward_split: BackwardSplit | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, arrivals: Arrivals | None = None) -> Tensor:
        """Weighted sum of chosen experts; nothing is dropped. x [tokens, hidden]; others [tokens, k]."""
        x = round_tokens(as_operand(x)) if self.fp8_dispatch else x
        if self.ep.size == 1:
            out = self._compute(x, indices, weights)
        else:
            out = self._elsewhere(x, indices, weights, arrivals)
        return round_gradients(out) if self.fp8_dispatch else out

    def _compute(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """My experts, by their numbers here: x [tokens, hidden]; others [tokens, k] -> [tokens, hidden]."""
        x, (experts, *matrix) = as_operand(x), self.gate_up_proj.shape
        multiple = row_multiple(x, prod(matrix), indices.numel() / experts)
        plan = (plan_rows if self.ep.size == 1 else plan_present)(indices, experts, multiple)
        if self.product is None:
            return operations.experts(x, self.gate_up_proj, self.down_proj, weights, plan, self.backward_split)
        gate_up = self.product(spread(x, plan), self.gate_up_proj, plan.counts, self.backward_split)
        # The routing weight multiplies the narrow inner activation, not the wide output: same product, less work.
        inner = scaled_swiglu(gate_up, spread_scales(weights, plan))
        return collect(self.product(inner, self.down_proj, plan.counts, self.backward_split), plan)

    def _elsewhere(self, x: Tensor, indices: Tensor, weights: Tensor, arrivals: Arrivals | None) -> Tensor:
        """Of the tokens, which tensor-parallel ranks have in common, send my share to where their experts are.

        Returns:
            [tokens, hidden]: whole results of my share, zeros elsewhere; the sum over tp puts them together.
        """
        held, tokens = self.gate_up_proj.shape[0], len(x)
        start, stop = (tokens * index // self.tp.size for index in (self.tp.index, self.tp.index + 1))
        hops = (
            Hop(self.ep_far, held * self.ep_near.size // self.tp.size),
            Hop(self.ep_near, held, copies=self.tp.size),
        )
        mine = Tokens(x[start:stop], indices[start:stop], weights[start:stop])
        return F.pad(through(hops, mine, self._compute, arrivals, self.fp8_dispatch), (0, 0, start, tokens - stop))


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
        out = self.experts(entered, indices, copy_to(weights, self.tp), counting.arrivals).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts.partial(entered.view_as(x))
        return reduce_from(out, self.tp)

"""SwiGLU feed-forward (arXiv:2002.05202), used by dense layers and shared experts."""

from __future__ import annotations

from torch import Tensor, nn

from model.kernels.swiglu import gated
from model.layers.linear import Linear, as_operand
from model.parallel.collectives import LOCAL, Axis, copy_to, reduce_from


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)): [..., hidden_size] -> [..., hidden_size]; inner features are cut over tp."""

    tp: Axis = LOCAL

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's share of the sum."""
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from(self.partial(copy_to(as_operand(x), self.tp)), self.tp)

"""silu(gate) * up (arXiv:2002.05202, SwiGLU), which keeps its two inputs alone for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, without a gradient: [rows, 2 * inner], gate first -> [rows, inner]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def swiglu_backward(gate_up: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`swiglu` times `scale` once more, and its gradients.

    Args:
        scale: [rows, 1]. grad: that of the output [rows, inner]; is overwritten.
    Returns:
        The output [rows, inner], and the gradients of `gate_up` and of `scale`.
    """
    gate, up = gate_up.chunk(2, -1)
    active = F.silu(gate)
    unscaled = active * up
    out = unscaled * scale
    dscale = unscaled.mul_(grad).sum(-1, keepdim=True)
    grad.mul_(scale)
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, -1)
    torch.mul(active, grad, out=dup)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=dgate)
    return out, dgate_up, dscale


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, scale)
        return swiglu(gate_up).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, scale = ctx.saved_tensors
        return swiglu_backward(gate_up, scale, grads[0].clone())[1:]


def scaled_swiglu(gate_up: Tensor, scale: Tensor) -> Tensor:
    """`swiglu` times `scale` [rows, 1], with gradients; gate and up lie side by side, and so do their gradients."""
    return _SwiGlu.apply(gate_up, scale.to(gate_up.dtype))


class _Gated(torch.autograd.Function):
    """Gate and up as two projections made them: each gradient is a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of two tensors of one shape."""
    return _Gated.apply(gate, up)

"""silu(gate) * up (arXiv:2002.05202, SwiGLU), which keeps its two inputs alone for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGlu(torch.autograd.Function):
    """Gate and up side by side, so that their gradients are written into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, scale)
        gate, up = gate_up.chunk(2, -1)
        out = F.silu(gate).mul_(up)
        return out if scale is None else out.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate_up, scale = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad, dscale = grads[0], None
        active = F.silu(gate)
        if scale is not None:
            if ctx.needs_input_grad[1]:
                dscale = (active * up).mul_(grad).sum(-1, keepdim=True)
            grad = grad * scale
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, -1)
        torch.mul(active, grad, out=dup)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        return dgate_up, dscale


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


def swiglu(gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
    """silu(gate) * up * scale: [..., 2 * inner], gate first, and [..., 1] -> [..., inner]."""
    return _SwiGlu.apply(gate_up, None if scale is None else scale.to(gate_up.dtype))

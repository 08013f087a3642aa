"""What stands in front of a sublayer: RMSNorm (arXiv:1910.07467), or DyT in its place (arXiv:2503.10622)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x): [..., dim] -> [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, without gradients: [..., dim] -> same. On a CPU torch's own takes half as long again."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return (x * _inverse_rms(x, eps)).mul_(weight)


class _RmsNorm(torch.autograd.Function):
    """x as it is and x / rms(x) * weight in fp32, in fewer passes over memory than autograd makes of it: the gradients
    of both are added in the last one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.set_materialize_grads(False)
        return x, (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        past, grad = grads
        if grad is None:
            return past, None, None
        product = grad * x
        rows, scales = product.flatten(0, -2), inverse.flatten()
        dweight = torch.mv(rows.t(), scales)
        along = torch.mv(rows, weight).mul_(scales).mul_(scales).div_(-x.shape[-1]).view_as(inverse)
        dx = torch.addcmul(torch.mul(x, along, out=product), grad, weight, out=product)
        return dx.mul_(inverse) if past is None else torch.addcmul(past, dx, inverse, out=dx), dweight, None


class RMSNorm(nn.Module):
    """Scales [..., dim] to unit root mean square, in fp32, then by a learned weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], in the dtype of `x`."""
        return self.beside(x)[1]

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, to go past a sublayer, and what the sublayer reads: [..., dim] each, in the dtype of `x`."""
        exact, weight = x.float(), self.weight.float()
        if not torch.is_grad_enabled():
            out = rms_norm(exact, weight, self.eps)
        elif x.device.type == "cpu":
            past, out = _RmsNorm.apply(exact, weight, self.eps)
            x = past if exact is x else x  # in another dtype its gradients do not meet here
        else:
            out = F.rms_norm(exact, weight.shape, weight, self.eps)
        return x, out if x.dtype == torch.float32 else out.to(x.dtype)


class DynamicTanh(nn.Module):
    """DyT(x) = weight * tanh(alpha * x) + bias, element by element: no statistics of the token (§4)."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], in the dtype of `x`."""
        squashed = torch.tanh(self.alpha.float() * x.float())
        return torch.addcmul(self.bias.float(), squashed, self.weight.float()).to(x.dtype)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `RMSNorm.beside`."""
        return x, self(x)


def build_norm(config: ModelConfig) -> RMSNorm | DynamicTanh:
    """The norm in front of a sublayer: [..., hidden_size] -> same."""
    if config.norm == "dyt":
        return DynamicTanh(config.hidden_size)
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


class FastNorm:
    """x / rms(x) * weight while tokens are generated: [..., dim] -> same; x has its features side by side.

    Of a single token, starting an operation is what takes time.
    """

    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = norm.weight, norm.eps
        self.dim = len(norm.weight)
        self._zeros = torch.zeros_like(norm.weight)
        self._is_quick = norm.weight.device.type == "cpu" and norm.weight.dtype == torch.float32 and norm.eps > 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() != self.dim or not self._is_quick:
            return rms_norm(x, self.weight, self.eps)
        one = x.view(-1)
        scale = (torch.dot(one, one).item() / self.dim + self.eps) ** -0.5
        return torch.addcmul(self._zeros, x, self.weight, value=scale)  # one operation in place of two


def prepared(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """What computes the same as `norm` without gradients, and sooner where it can."""
    return FastNorm(norm) if isinstance(norm, RMSNorm) and norm.weight.dtype == torch.float32 else norm

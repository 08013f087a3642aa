"""Muon (Keller Jordan 2024; arXiv:2502.16982, §2): the momentum of a matrix, orthogonalised, is its update.

Embedding, head, router, norms and every vector keep AdamW. The update's root mean square is AdamW's usual one
(0.2, §2.2), so that learning rate and weight decay mean the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Quintic iteration that pushes singular values into [0.7, 1.2], steepest at zero; five rounds (Jordan 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7
RMS = 0.2
# Tables and choices rather than maps between features: left to AdamW (arXiv:2502.16982, §2.2 and §3.1).
_NOT_MAPS = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "position_embedding", "recursion.weight")


def is_orthogonalised(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves the parameter of this name in the whole model."""
    return parameter.dim() >= 2 and not name.endswith(_NOT_MAPS)


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """U S' V^T of each matrix U S V^T, with S' near one, by Newton-Schulz: [..., rows, columns] -> same, in `dtype`."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / x.flatten(-2).norm(dim=-1).clamp(min=EPSILON)[..., None, None]  # spectral norm at most one
    a, b, c = COEFFICIENTS
    multiply: Callable[..., Tensor] = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(STEPS):
        gram = x @ x.mT
        x = multiply(x, multiply(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """A view of a parameter as the matrices it holds: [..., d_out, d_in].

    Gate and up projections of an expert are stacked; each is a map of its own, as in a dense feed-forward.
    """
    if name.endswith("experts.gate_up_proj"):
        return tensor.unflatten(1, (2, -1)).flatten(0, 1)
    return tensor


class Muon(torch.optim.AdamW):
    """Muon for the groups marked "muon", AdamW for the others.

    Args:
        groups: as AdamW's; a marked one has "names" of its parameters beside "params".
        momentum: of the exponential average of gradients, used with Nesterov's look-ahead.
        dtype: of the iteration; by default bf16 on a GPU, as the papers have it, and fp32 on a CPU, whose bf16 products
            are no faster.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(list(groups), lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter; takes the gradients of Muon's away, so that AdamW passes them over."""
        assert closure is None
        for group in self.param_groups:
            if group.get("muon"):
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    self._move(name, parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None
        super().step()

    def _move(self, name: str, parameter: nn.Parameter, lr: float, weight_decay: float) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        average = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(average, self.momentum)
        dtype = self.dtype or (torch.bfloat16 if parameter.is_cuda else torch.float32)
        update = orthogonalise(as_matrices(name, ahead), dtype)
        scale = RMS * max(update.shape[-2:]) ** 0.5  # an orthogonal matrix's RMS is 1 / sqrt(max(d_out, d_in))
        parameter.mul_(1 - lr * weight_decay).add_(update.reshape(parameter.shape), alpha=-lr * scale)

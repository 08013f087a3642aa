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
# Rounds that are the best together for singular values in [0.001, 1] (arXiv:2505.16932, algorithm 1, with its safety
# factor of 0.02 and cushion of 0.02): the last values come near one, where Jordan's stay within a third of it.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
ITERATIONS = {"newton_schulz": (COEFFICIENTS,) * STEPS, "polar_express": POLAR_EXPRESS}
SAFETY = {"newton_schulz": 1.0, "polar_express": 1.01}  # rounding must not lift a value above one
NEURON_DECAY = 0.95  # of the second moments of neurons (arXiv:2510.05491, §4)
EPSILON = 1e-7
RMS = 0.2
# Tables and choices rather than maps between features: left to AdamW (arXiv:2502.16982, §2.2 and §3.1).
VALUE_TABLES = ("value_embedding.table", "value_embedding.table_with_mqa")
_NOT_MAPS = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "position_embedding", "recursion.weight")


def is_orthogonalised(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves the parameter of this name in the whole model."""
    return parameter.dim() >= 2 and not name.endswith(_NOT_MAPS + VALUE_TABLES)


def orthogonalise(matrices: Tensor, dtype: torch.dtype, iteration: str = "newton_schulz") -> Tensor:
    """U S' V^T of each matrix U S V^T, with S' near one, by one of ITERATIONS: [..., rows, columns] -> same, in
    `dtype`."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    norms = SAFETY[iteration] * x.flatten(-2).norm(dim=-1).clamp(min=EPSILON)
    x = x / norms[..., None, None]  # spectral norm at most one
    multiply: Callable[..., Tensor] = torch.addmm if x.dim() == 2 else torch.baddbmm
    for a, b, c in ITERATIONS[iteration]:
        gram = x @ x.mT
        x = multiply(x, multiply(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def equalised(update: Tensor, squares: Tensor) -> Tensor:
    """The update with the neurons' steps brought to one size, its norm as it was (NorMuon, arXiv:2510.05491, §4).

    Neurons are the rows, of a wide matrix the columns: those of which there are more.

    Args:
        update: [..., d_out, d_in]. squares: same shape, the running mean squares of each neuron, which are moved on.
    """
    dim = -1 if update.shape[-2] >= update.shape[-1] else -2
    squares.lerp_(update.square().mean(dim, keepdim=True).expand_as(squares), 1 - NEURON_DECAY)
    scaled = update * squares.clamp(min=1e-10).rsqrt()
    return scaled * (_norms(update) / _norms(scaled).clamp(min=EPSILON))


def _norms(x: Tensor) -> Tensor:
    return x.flatten(-2).norm(dim=-1)[..., None, None]


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """A view of a parameter as the matrices it holds: [..., d_out, d_in].

    Gate and up projections of an expert are stacked; each is a map of its own, as in a dense feed-forward.
    """
    if name.endswith("experts.gate_up_proj"):
        return tensor.unflatten(1, (2, -1)).flatten(0, 1)
    return tensor


def moments(equalise: bool) -> tuple[str, ...]:
    """What Muon keeps of a matrix between steps, each of its shape."""
    return ("momentum_buffer", "neuron_squares") if equalise else ("momentum_buffer",)


class Muon(torch.optim.AdamW):
    """Muon for the groups marked "muon", AdamW for the others.

    Args:
        groups: as AdamW's; a marked one has "names" of its parameters beside "params".
        momentum: of the exponential average of gradients, used with Nesterov's look-ahead.
        iteration: one of ITERATIONS. equalise: neurons take steps of one size. cautious: weights are decayed only where
            the update shrinks them too (arXiv:2510.12402).
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
        iteration: str = "newton_schulz",
        equalise: bool = False,
        cautious: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(list(groups), lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum, self.dtype = momentum, dtype
        self.iteration, self.equalise, self.cautious = iteration, equalise, cautious

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
            state.update({key: torch.zeros_like(parameter) for key in moments(self.equalise)})
        state["step"] += 1
        average = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(average, self.momentum)
        dtype = self.dtype or (torch.bfloat16 if parameter.is_cuda else torch.float32)
        update = orthogonalise(as_matrices(name, ahead), dtype, self.iteration)
        scale = RMS * max(update.shape[-2:]) ** 0.5  # an orthogonal matrix's RMS is 1 / sqrt(max(d_out, d_in))
        if self.equalise:
            update = equalised(update.float(), as_matrices(name, state["neuron_squares"]))
        update = update.reshape(parameter.shape)
        if self.cautious:
            parameter.addcmul_(parameter, update * parameter >= 0, value=-lr * weight_decay)
        else:
            parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update, alpha=-lr * scale)

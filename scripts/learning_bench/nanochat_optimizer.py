"""The optimizer of karpathy's nanochat, written anew from its published description: Muon as of July 2026, and AdamW.

Muon: Nesterov momentum, rows brought to one norm (arXiv:2603.28254), Polar Express (arXiv:2505.16932), the exact norm
restored (arXiv:2602.21545), a second moment a neuron (arXiv:2510.05491), weight decay where it agrees with the update.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from scripts.learning_bench.nanochat import NanochatGPT

# arXiv:2505.16932, five rounds, safety factor 0.02, cushion 2.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MATRIX_LR, EMBEDDING_LR, HEAD_LR, SCALAR_LR = 0.02, 0.3, 0.008, 0.5
WEIGHT_DECAY = 0.28
REFERENCE_WIDTH, REFERENCE_BATCH = 768, 2**19  # of the AdamW rates; tokens of a batch of all rates
WARM_UP, WARM_DOWN, FINAL = 40, 0.65, 0.05


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, constant, linear decay over the last 65% to a twentieth."""
    warm_up, warm_down = min(WARM_UP, max(1, steps // 10)), round(WARM_DOWN * steps)
    if step < warm_up:
        return (step + 1) / warm_up
    left = min(1.0, (steps - step) / warm_down)
    return left + (1 - left) * FINAL


def momentum_at(step: int, steps: int) -> float:
    """From 0.85 to 0.97 over the first 400 steps, down to 0.90 while the rate decays."""
    warm_down = round(WARM_DOWN * steps)
    if step < 400:
        return 0.85 + (0.97 - 0.85) * step / 400
    progress = max(0.0, (step - (steps - warm_down)) / warm_down)
    return 0.97 + (0.90 - 0.97) * progress


class NanochatOptimizer:
    """Moves a `NanochatGPT`; each matrix by Muon, tables and scalars by AdamW.

    Args:
        batch_tokens: of a step; all rates fall with its square root, as published.
        rates: a factor on all rates, for a scan. weight_decay: of Muon, at a full rate.
    """

    def __init__(self, model: NanochatGPT, *, batch_tokens: int, steps: int, rates: float = 1.0,
                 weight_decay: float = WEIGHT_DECAY):  # fmt: skip
        self.steps, self.weight_decay = steps, weight_decay
        scale = rates * (batch_tokens / REFERENCE_BATCH) ** 0.5
        tables = scale * (model.shape.width / REFERENCE_WIDTH) ** -0.5
        self.matrices = list(model.blocks.parameters())
        self.matrix_lr = MATRIX_LR * scale
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        smear = [model.smear_gate.weight, model.smear_lambda, model.backout_lambda]

        def group(params: list[nn.Parameter], lr: float, betas: tuple[float, float], decay: float) -> dict[str, Any]:
            return {"params": params, "lr": lr, "first": lr, "betas": betas, "weight_decay": decay}

        values = list(model.value_embeds.parameters())
        self.adamw = torch.optim.AdamW([
            group([model.lm_head.weight], HEAD_LR * tables, (0.8, 0.96), 0.01),
            group([model.wte.weight], EMBEDDING_LR * tables, (0.8, 0.995), 0.001),
            group(values, EMBEDDING_LR * tables * 0.5, (0.8, 0.995), 0.01),
            group([model.resid_lambdas], SCALAR_LR * scale * 0.01, (0.8, 0.95), 0.05),
            group([model.x0_lambdas], SCALAR_LR * scale, (0.96, 0.95), 0.0),
            group(smear, 0.2, (0.8, 0.95), 0.0),
        ], eps=1e-10, fused=True)  # fmt: skip

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Step `step` (from 0), with the gradients that are there; takes them away."""
        factor = rate_factor(step, self.steps)
        for group in self.adamw.param_groups:
            group["lr"] = group["first"] * factor
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        decay = self.weight_decay * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for matrix in self.matrices:
            self._move(matrix, self.matrix_lr * factor, decay, momentum_at(step, self.steps))
            matrix.grad = None

    def _move(self, matrix: nn.Parameter, lr: float, decay: float, momentum: float) -> None:
        gradient = matrix.grad
        assert gradient is not None
        tall = matrix.shape[0] >= matrix.shape[1]
        state = self.state.setdefault(matrix, {"average": torch.zeros_like(matrix)})
        average = state["average"].lerp_(gradient, 1 - momentum)
        update = orthogonal(gradient.lerp(average, momentum))
        squares = update.square().mean(1 if tall else 0, keepdim=True)
        second = state.setdefault("second", torch.zeros_like(squares)).lerp_(squares, 0.1)
        scaled = update * second.clamp_min(1e-10).rsqrt()
        update = scaled * (update.norm() / scaled.norm().clamp_min(1e-10))
        rate = lr * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        agrees = update * matrix >= 0
        matrix.sub_(rate * update + rate * decay * matrix * agrees)


def orthogonal(x: Tensor) -> Tensor:
    """The matrix with all singular values near one, of the norm of an exact one: [rows, columns] -> same."""
    x = x * (x.norm() / x.shape[0] ** 0.5 / x.norm(dim=1, keepdim=True).clamp_min(1e-6))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (1.01 * x.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x * (min(x.shape) ** 0.5 / x.norm().clamp_min(1e-6))
    return x.T if tall else x

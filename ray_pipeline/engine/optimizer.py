"""AdamW with weight decay on matrices alone, learning-rate schedules, and the global gradient norm over all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.parallel.mesh import Mesh
from ray_pipeline.config import OptimizerConfig


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101); norms are not decayed. Fused: the per-tensor loop costs three times as much."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then cosine, or stable then linear decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return floor + (config.lr - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    decay_steps = max(1, round(config.decay_fraction * steps))
    remaining = min(1.0, (steps - step) / decay_steps)
    return floor + (config.lr - floor) * remaining


@torch.no_grad()
def clip_by_global_norm(gradients: list[Tensor], max_norm: float, mesh: Mesh) -> float:
    """Scale gradients in place so that the norm over every stage is at most `max_norm`.

    Returns:
        The norm before clipping. The formula is torch's clip_grad_norm_ (epsilon 1e-6 included).
    """
    squares = torch.stack([g.float().pow(2).sum() for g in gradients]).sum()
    norm = mesh.all_reduce(squares, "model").sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return float(norm)

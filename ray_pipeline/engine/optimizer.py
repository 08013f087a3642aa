"""AdamW with weight decay on matrices alone, learning-rate schedules, and the global gradient norm over all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.parallel.mesh import Mesh
from model.parallel.shard import shard_of
from ray_pipeline.config import OptimizerConfig

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


def is_cut_expert(name: str, mesh: Mesh) -> bool:
    """Whether ranks of different replicas hold different parts of the parameter."""
    return mesh.sizes.ep > 1 and shard_of(name).expert


def expert_group_name(mesh: Mesh) -> str:
    """What DeepSpeed calls the group of ranks that together hold all experts."""
    return f"ep_size_{mesh.sizes.ep}"


def build_optimizer(named: dict[str, nn.Parameter], config: OptimizerConfig, mesh: Mesh) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), or plain SGD, which shows a wrong gradient scale that Adam hides.

    Norms are not decayed. Fused: the per-tensor loop costs three times as much.
    """
    experts = [p for name, p in named.items() if is_cut_expert(name, mesh)]
    dense = [p for name, p in named.items() if not is_cut_expert(name, mesh)]
    groups = [
        {"params": [p for p in dense if p.dim() > 1], "weight_decay": config.weight_decay, "name": "matrices"},
        {"params": [p for p in dense if p.dim() <= 1], "weight_decay": 0.0, "name": "vectors"},
        {"params": experts, "weight_decay": config.weight_decay, "name": expert_group_name(mesh), "moe": True},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        for group in groups:
            group["weight_decay"] = 0.0
        return torch.optim.SGD(groups, lr=config.lr)
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


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack([tensor.float().pow(2).sum() for tensor in tensors]).sum()


@torch.no_grad()
def clip_by_global_norm(gradients: dict[str, Tensor], max_norm: float, mesh: Mesh) -> float:
    """Scale reduced gradients in place so that the norm over the whole model is at most `max_norm`.

    A slice counts on each rank that holds it, a parameter that tensor-parallel ranks all hold counts once, and expert
    slices are summed over expert-parallel ranks too.

    Returns:
        The norm before clipping. The formula is torch's clip_grad_norm_ (epsilon 1e-6 included).
    """
    counted = {n: g for n, g in gradients.items() if mesh.place["tp"] == 0 or shard_of(n).tp_dim is not None}
    device = next(iter(gradients.values())).device
    squares = _sum_of_squares([g for n, g in counted.items() if not is_cut_expert(n, mesh)], device)
    if mesh.sizes.ep > 1:
        experts = _sum_of_squares([g for n, g in counted.items() if is_cut_expert(n, mesh)], device)
        squares = squares + mesh.all_reduce(experts, "ep")
    norm = mesh.all_reduce(squares, "model").sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if float(scale) != 1.0:
        torch._foreach_mul_(list(gradients.values()), scale)
    return float(norm)

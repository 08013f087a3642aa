"""AdamW and Muon with weight decay on matrices alone, learning-rate schedules, the gradient norm over all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.parallel.mesh import Mesh
from model.parallel.shard_plan import shard_of
from ray_pipeline.engine.muon import VALUE_TABLES, Muon, is_orthogonalised, moments
from ray_pipeline.settings.schema import OptimizerConfig

CPU = torch.device("cpu")
RATE = "lr_factor"  # of a parameter group
TABLES = {"embedding": ("embed_tokens.weight", *VALUE_TABLES), "head": ("lm_head.weight",)}
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


def moments_of(name: str, parameter: Tensor, config: OptimizerConfig) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter between steps; Muon leaves some of them to AdamW."""
    if config.name != "muon":
        return MOMENTS[config.name]
    return moments(config.muon_equalise) if is_orthogonalised(name, parameter) else MOMENTS["adamw"]


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Matrices are; norms, other vectors and the scales of a recursion, a vector each, are not."""
    return parameter.dim() > 1 and not name.endswith("recursion.weight")


def is_cut_expert(name: str, mesh: Mesh) -> bool:
    """Whether ranks of different replicas hold different parts of the parameter."""
    return mesh.sizes.ep > 1 and shard_of(name).expert


def expert_group_name(mesh: Mesh) -> str:
    """What DeepSpeed calls the group of ranks that together hold all experts."""
    return f"ep_size_{mesh.sizes.ep}"


def table_of(name: str, config: OptimizerConfig) -> str | None:
    """Embedding (of values too) or head, where it has a rate of its own."""
    factors = {"embedding": config.embedding_lr_factor, "head": config.head_lr_factor}
    return next((key for key, ends in TABLES.items() if name.endswith(ends) and factors[key] != 1), None)


def _table_groups(
    tables: dict[str, str], dense: dict[str, nn.Parameter], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Embedding and head with rates of their own; they decay as fast as with the common one."""
    factors = {"embedding": config.embedding_lr_factor, "head": config.head_lr_factor}
    return [
        {
            "params": [dense[name] for name, table in tables.items() if table == key], "name": key,
            "weight_decay": config.weight_decay / factor, RATE: factor,
        }
        for key, factor in factors.items()
    ]  # fmt: skip


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Before a step: each group's rate is `rate` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE, 1.0)


def build_optimizer(named: dict[str, nn.Parameter], config: OptimizerConfig, mesh: Mesh) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), Muon, or plain SGD, which shows a wrong gradient scale that Adam hides.

    Norms are not decayed. Fused: the per-tensor loop costs three times as much.
    """
    assert config.name != "muon" or mesh.sizes.tp == 1, "layout.rules refuses parts of matrices"
    orthogonal = {n: p for n, p in named.items() if config.name == "muon" and is_orthogonalised(n, p)}
    experts = [p for n, p in named.items() if is_cut_expert(n, mesh) and n not in orthogonal]
    dense = {n: p for n, p in named.items() if not is_cut_expert(n, mesh) and n not in orthogonal}
    tables = {n: table for n in dense if (table := table_of(n, config)) is not None}
    matrices = [p for n, p in dense.items() if is_decayed(n, p) and n not in tables]
    vectors = [p for n, p in dense.items() if not is_decayed(n, p)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors", RATE: config.vector_lr_factor},
        *_table_groups(tables, dense, config),
        {"params": experts, "weight_decay": config.weight_decay, "name": expert_group_name(mesh), "moe": True},
    ]
    if orthogonal:
        marked = {"params": list(orthogonal.values()), "names": list(orthogonal), "name": "muon", "muon": True}
        groups.append(marked | {"weight_decay": config.weight_decay})
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        for group in groups:
            group["weight_decay"] = 0.0
        return torch.optim.SGD(groups, lr=config.lr)
    if config.name == "muon":
        return Muon(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, momentum=config.momentum,
            iteration=config.muon_iteration, equalise=config.muon_equalise, cautious=config.cautious_decay,
        )  # fmt: skip
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then cosine, or stable then linear decay."""
    warm_up = config.warm_up(steps)
    if step < warm_up:
        return config.lr * (step + 1) / warm_up
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - warm_up) / max(1, steps - warm_up)
        return floor + (config.lr - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    decay_steps = max(1, round(config.decay_fraction * steps))
    remaining = min(1.0, (steps - step) / decay_steps)
    return floor + (config.lr - floor) * remaining


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.cat([_row_norms(tensor.float()).flatten() for tensor in tensors]).square_().sum()


def _row_norms(x: Tensor) -> Tensor:
    """Of a matrix's rows, without a matrix of squares; a vector as it is: a norm of many numbers is inexact."""
    return torch.linalg.vector_norm(x, dim=-1) if x.dim() > 1 else x


@torch.no_grad()
def global_norm(gradients: dict[str, Tensor], mesh: Mesh, device: torch.device = CPU) -> Tensor:
    """Norm of reduced gradients over the whole model: [], on `device` where this rank has none.

    A slice counts on each rank that holds it, a parameter that tensor-parallel ranks all hold counts once, and expert
    slices are summed over expert-parallel ranks too.
    """
    counted = {n: g for n, g in gradients.items() if mesh.place["tp"] == 0 or shard_of(n).tp_dim is not None}
    device = next(iter(gradients.values())).device if gradients else device
    squares = _sum_of_squares([g for n, g in counted.items() if not is_cut_expert(n, mesh)], device)
    if mesh.sizes.ep > 1:
        experts = _sum_of_squares([g for n, g in counted.items() if is_cut_expert(n, mesh)], device)
        squares = squares + mesh.all_reduce(experts, "ep")
    return mesh.all_reduce(squares, "model").sqrt()


def clipped_step(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float) -> None:
    """A step with gradients of this global norm scaled so that it is at most `max_norm`.

    The formula is torch's clip_grad_norm_ (epsilon 1e-6 included). The fused AdamW divides gradients where it reads
    them, which saves a pass over all of them.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    clips = float(factor) != 1.0
    if type(optimizer) is torch.optim.AdamW:  # Muon, which is one too, reads them itself
        vars(optimizer)["grad_scale"] = factor.reciprocal() if clips else None
    elif clips:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
    optimizer.step()

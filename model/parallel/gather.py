"""The whole model's state dict from the slices of all ranks: for evaluation, sampling and the saved model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.collectives import Axis, collective
from model.parallel.mesh import Mesh
from model.parallel.shard_plan import join_tp, shard_of

Shapes = list[tuple[str, torch.Size]]


def gather_state(local: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Slices of this rank's parameters -> every parameter of the model, whole, in fp32 on the CPU of every rank."""
    tensors = {name: tensor.detach().float() for name, tensor in local.items()}
    tensors = _join(tensors, mesh.axis("tp"), lambda n: shard_of(n).tp_dim is not None, _join_slices)
    tensors = _join(tensors, mesh.axis("ep"), lambda n: shard_of(n).expert, lambda n, parts: torch.cat(parts))
    return _broadcast_stages(tensors, mesh)


def _join_slices(name: str, parts: list[Tensor]) -> Tensor:
    return join_tp(parts, shard_of(name))


def _join(
    tensors: dict[str, Tensor], axis: Axis, is_cut: Callable[[str], bool], join: Callable[[str, list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Gather the tensors that are cut over the axis, in one message."""
    names = [name for name in tensors if is_cut(name)]
    if axis.size == 1 or not names:
        return tensors
    flat = torch.cat([tensors[name].flatten() for name in names])
    everyone = [torch.empty_like(flat) for _ in range(axis.size)]
    with collective(axis, "all-gather"):
        dist.all_gather(everyone, flat, group=axis.group)
    sizes = [tensors[name].numel() for name in names]
    slices = zip(*(part.split(sizes) for part in everyone), strict=True)
    joined = {
        name: join(name, [part.view(tensors[name].shape) for part in parts])
        for name, parts in zip(names, slices, strict=True)
    }
    return {name: joined.get(name, tensor) for name, tensor in tensors.items()}


def _broadcast_stages(tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Every pipeline rank's tensors to all of them."""
    axis = mesh.axis("pp")
    if axis.size == 1:
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    layout: list[Shapes | None] = [None] * axis.size
    device = next(iter(tensors.values())).device
    with collective(axis, "all-gather"):
        dist.all_gather_object(layout, [(name, tensor.shape) for name, tensor in tensors.items()], group=axis.group)
    out: dict[str, Tensor] = {}
    for source, shapes in zip(axis.ranks, layout, strict=True):
        assert shapes is not None
        if source == mesh.rank:
            flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
        else:
            flat = torch.empty(sum(shape.numel() for _, shape in shapes), device=device)
        with collective(axis, "broadcast"):
            dist.broadcast(flat, source, group=axis.group)
        parts = flat.cpu().split([shape.numel() for _, shape in shapes])
        out |= {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
    return out


def all_ranks_gather(mesh: Mesh, value: object) -> list[Any]:
    """`value` of every rank, in rank order."""
    if mesh.world == 1:
        return [value]
    out: list[Any] = [None] * mesh.world
    dist.all_gather_object(out, value)
    return out

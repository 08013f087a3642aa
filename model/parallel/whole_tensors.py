"""The whole model from the slices of all ranks, a tensor at a time on rank 0: what a saved model is written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.collectives import Axis, collective
from model.parallel.mesh import Mesh
from model.parallel.shard_plan import Shard, join_tp, shard_of


class WholeTensors:
    """Called on every rank alike; none holds more of other ranks' weights than a tensor, of experts a piece.

    Args:
        local: this rank's slices by name in the whole model.
    Attributes:
        shapes: of every whole tensor, in order of names; all are fp32.
    """

    def __init__(self, local: Mapping[str, Tensor], mesh: Mesh):
        self.local, self.mesh, self.pp = local, mesh, mesh.axis("pp")
        mine = {name: whole_shape(tensor.shape, shard_of(name), mesh) for name, tensor in local.items()}
        everyone: list[dict[str, torch.Size]] = [mine]
        if self.pp.size > 1:
            everyone = [{} for _ in range(self.pp.size)]
            with collective(self.pp, "all-gather"):
                dist.all_gather_object(everyone, mine, group=self.pp.group)
        owners = {name: index for index, shapes in enumerate(everyone) for name in shapes}
        self.owners = {name: owners[name] for name in sorted(owners)}
        self.shapes = {name: everyone[index][name] for name, index in self.owners.items()}

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor | None]:
        """In the order of `shapes`, on the CPU of rank 0; None elsewhere. Tensors of experts come in pieces that stand
        behind one another along the first dimension, from one expert-parallel rank each."""
        for name, owner in self.owners.items():
            for replica in range(self.mesh.sizes.ep if shard_of(name).expert else 1):
                yield self._piece(name, owner, replica)

    def _piece(self, name: str, owner: int, replica: int) -> Tensor | None:
        """From the ranks of a pipeline rank's replica, whose slices are joined over tp, to rank 0."""
        mesh, shard, piece = self.mesh, shard_of(name), None
        if mesh.pp_rank == owner and mesh.axis("replica").index == replica:
            piece = _joined(self.local[name].detach().float().contiguous(), shard, mesh.axis("tp"))
        place = {"pp": owner, "dp": replica // mesh.sizes.sp, "sp": replica % mesh.sizes.sp, "tp": 0}
        source, way = mesh.sizes.rank(place), Axis("world", tuple(range(mesh.world)))
        if source and mesh.rank == source:
            assert piece is not None
            with collective(way, "send"):
                dist.send(piece, 0)
        elif source and mesh.rank == 0:
            shape = list(self.shapes[name])
            shape[0] //= mesh.sizes.ep if shard.expert else 1
            piece = torch.empty(shape, device=next(iter(self.local.values())).device)
            with collective(way, "receive"):
                dist.recv(piece, source)
        return piece.cpu() if piece is not None and mesh.rank == 0 else None


def _joined(tensor: Tensor, shard: Shard, tp: Axis) -> Tensor:
    if shard.tp_dim is None or tp.size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(tp.size)]
    with collective(tp, "all-gather"):
        dist.all_gather(parts, tensor, group=tp.group)
    return join_tp(parts, shard)


def whole_shape(shape: torch.Size, shard: Shard, mesh: Mesh) -> torch.Size:
    """Of the tensor that a slice of this shape is cut from."""
    sizes = list(shape)
    if shard.tp_dim is not None:
        sizes[shard.tp_dim] *= mesh.sizes.tp
    if shard.expert:
        sizes[0] *= mesh.sizes.ep
    return torch.Size(sizes)

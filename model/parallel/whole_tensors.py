"""The whole model from the slices of all ranks, a tensor at a time on rank 0: what a saved model is written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.collectives import collective
from model.parallel.gather import join_slices
from model.parallel.mesh import Mesh
from model.parallel.shard_plan import Shard, shard_of


class WholeTensors:
    """Called on every rank alike; none holds more of other ranks' weights than a tensor.

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
        """In the order of `shapes`: the tensor on rank 0, on its CPU; None elsewhere."""
        for name, owner in self.owners.items():
            tensor = None
            if owner == self.pp.index:
                shard, tensor = shard_of(name), self.local[name].detach().float()
                tensor = join_slices(tensor, shard, tp=self.mesh.axis("tp"), ep=self.mesh.axis("ep"))
            tensor = self._to_the_first(tensor, owner, self.shapes[name])
            yield tensor.cpu() if tensor is not None and self.mesh.rank == 0 else None

    def _to_the_first(self, tensor: Tensor | None, owner: int, shape: torch.Size) -> Tensor | None:
        """From the pipeline rank that has it to the first of my pipeline."""
        if owner == 0 or any(self.mesh.place[axis] for axis in ("dp", "sp", "tp")):
            return tensor
        if tensor is not None:
            with collective(self.pp, "send"):
                dist.send(tensor.contiguous(), self.pp.ranks[0], group=self.pp.group)
        elif self.pp.index == 0:
            tensor = torch.empty(shape, device=next(iter(self.local.values())).device)
            with collective(self.pp, "receive"):
                dist.recv(tensor, self.pp.ranks[owner], group=self.pp.group)
        return tensor


def whole_shape(shape: torch.Size, shard: Shard, mesh: Mesh) -> torch.Size:
    """Of the tensor that a slice of this shape is cut from."""
    sizes = list(shape)
    if shard.tp_dim is not None:
        sizes[shard.tp_dim] *= mesh.sizes.tp
    if shard.expert:
        sizes[0] *= mesh.sizes.ep
    return torch.Size(sizes)

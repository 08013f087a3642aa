"""Ranks and process groups of a layout.

Rank grid (pp, dp, sp, tp), tp fastest: tensor-parallel peers sit next to each other, where links are fastest. EP is
carved out of dp x sp: neighbours among the replicas hold different experts.
A `Mesh` is also the `mpu` DeepSpeed asks for; to it "data parallel" means every dense replica, dp x sp.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from model.parallel.collectives import Axis, collective

AXES = ("pp", "dp", "sp", "tp")
# Name of a process group -> the axes along which its ranks differ.
GROUPS = {
    "pp": ("pp",),  # messages from lower to higher pipeline ranks
    "pp_back": ("pp",),  # and back: on one connection, messages that meet could block each other under NCCL
    "dp": ("dp",),
    "sp": ("sp",),
    "tp": ("tp",),
    "replica": ("dp", "sp"),
    "model": ("pp", "tp"),
}


@dataclass(frozen=True)
class MeshSizes:
    """Number of ranks along each axis; ep divides dp * sp and adds no ranks."""

    pp: int = 1
    dp: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.sp * self.tp

    @property
    def replicas(self) -> int:
        """Copies of a dense weight: every one of them sees other tokens."""
        return self.dp * self.sp

    def _sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Axis -> index of `rank`."""
        out = {}
        for axis, size in zip(reversed(AXES), reversed(self._sizes()), strict=True):
            rank, out[axis] = divmod(rank, size)
        return out

    def rank(self, coordinate: dict[str, int]) -> int:
        """Inverse of `coordinate`."""
        rank = 0
        for axis, size in zip(AXES, self._sizes(), strict=True):
            rank = rank * size + coordinate[axis]
        return rank

    def groups(self, *axes: str) -> list[list[int]]:
        """The groups of ranks that differ along `axes` alone; together they partition the world."""
        out: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            place = self.coordinate(rank)
            out.setdefault(tuple(place[a] for a in AXES if a not in axes), []).append(rank)
        return list(out.values())

    def expert_groups(self) -> list[list[int]]:
        """Ranks that together hold all experts of a stage: consecutive replicas."""
        replicas = self.groups("dp", "sp")
        return [ranks[i : i + self.ep] for ranks in replicas for i in range(0, len(ranks), self.ep)]

    def expert_replica_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts."""
        return [ranks[i :: self.ep] for ranks in self.groups("dp", "sp") for i in range(self.ep)]

    def all_groups(self) -> dict[str, list[list[int]]]:
        """Every kind of process group by name."""
        named = {name: self.groups(*axes) for name, axes in GROUPS.items()}
        return named | {"ep": self.expert_groups(), "expert_replica": self.expert_replica_groups()}


class Mesh:
    """This process's place in the layout, and its process groups. Several ranks need torch.distributed."""

    def __init__(self, sizes: MeshSizes, *, timeout: timedelta = timedelta(minutes=10)):
        distributed = dist.is_initialized()
        self.sizes = sizes
        self.world = dist.get_world_size() if distributed else 1
        if sizes.world != self.world:
            raise ValueError(f"layout of {sizes.world} ranks ({sizes}) started with {self.world} processes")
        if sizes.replicas % sizes.ep:
            raise ValueError(f"ep={sizes.ep} does not divide dp x sp = {sizes.replicas}")
        self.rank = dist.get_rank() if distributed else 0
        self.place = sizes.coordinate(self.rank)
        self._axes: dict[str, Axis] = {}
        # One-rank groups, for those who cannot take None.
        alone = [dist.new_group([rank]) for rank in range(self.world)] if distributed else []
        self._alone = alone[self.rank] if distributed else None
        made: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}
        for name, groups in sizes.all_groups().items():
            for ranks in groups:
                # Every rank must take part in making every group, its own or not. Equal groups share one.
                key = (name if name in ("pp", "pp_back") else "", tuple(ranks))  # the pipeline's have their own
                if key not in made:
                    made[key] = dist.new_group(ranks, timeout=timeout) if distributed and len(ranks) > 1 else None
                if self.rank in ranks:
                    self._axes[name] = Axis(name, tuple(ranks), ranks.index(self.rank), made[key])

    @property
    def pp_rank(self) -> int:
        return self.place["pp"]

    @property
    def dp_rank(self) -> int:
        """Index among the ranks that read different rows."""
        return self.place["dp"]

    @property
    def dp(self) -> int:
        """Number of shares the rows of a batch are cut into."""
        return self.sizes.dp

    def axis(self, name: str) -> Axis:
        """My group along `name`: pp, pp_back, dp, sp, tp, ep, replica (dp x sp), expert_replica, model (pp x tp)."""
        return self._axes[name]

    def ranks(self, name: str) -> tuple[int, ...]:
        """Global ranks of my group along `name`."""
        return self._axes[name].ranks

    def group(self, name: str) -> dist.ProcessGroup | None:
        """My process group along `name`; None where I am alone."""
        return self._axes[name].group

    def all_reduce(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Sum in place over my group along `name`."""
        axis = self._axes[name]
        if axis.size > 1:
            with collective(axis, "all-reduce"):
                dist.all_reduce(tensor, group=axis.group)
        return tensor

    def group_or_alone(self, name: str) -> dist.ProcessGroup | None:
        """The group even where I am alone in it: DeepSpeed takes None for the whole world."""
        return self._axes[name].group or self._alone

    # The interface DeepSpeed reads. get_model_parallel_rank must be the tensor-parallel rank: it decides who counts
    # parameters that tensor parallelism does not split in the gradient norm.
    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.group_or_alone("replica")

    def get_data_parallel_world_size(self) -> int:
        return self.sizes.replicas

    def get_data_parallel_rank(self) -> int:
        return self._axes["replica"].index

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.group_or_alone("model")

    def get_model_parallel_world_size(self) -> int:
        return self.sizes.pp * self.sizes.tp

    def get_model_parallel_rank(self) -> int:
        return self.place["tp"]

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.group_or_alone("tp")

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.sizes.tp

    def get_tensor_model_parallel_rank(self) -> int:
        return self.place["tp"]

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.group_or_alone("pp")

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.sizes.pp

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.pp_rank

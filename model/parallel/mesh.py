"""Ranks and process groups of a layout.

Rank grid (pp, dp, sp, tp), tp fastest: tensor-parallel peers sit next to each other, where links are fastest.
A `Mesh` is also the `mpu` DeepSpeed asks for; to it "data parallel" means every dense replica, dp x sp.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist

AXES = ("pp", "dp", "sp", "tp")


@dataclass(frozen=True)
class MeshSizes:
    """Number of ranks along each axis."""

    pp: int = 1
    dp: int = 1
    sp: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.sp * self.tp

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


def split_layers(num_layers: int, stages: int, tail: float = 0.0) -> list[range]:
    """Consecutive layers per pipeline stage so that the costliest stage costs least.

    Args:
        tail: what the last stage computes besides its layers (head, MTP modules), in layers.
    """
    assert 1 <= stages <= num_layers
    if stages == 1:
        return [range(num_layers)]
    last = min(max(1, round((num_layers + tail) / stages - tail)), num_layers - stages + 1)
    size, extra = divmod(num_layers - last, stages - 1)
    counts = [size + (i < extra) for i in range(stages - 1)] + [last]
    stops = list(accumulate(counts))
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


class Mesh:
    """This process's place in the layout, and its process groups. Several ranks need torch.distributed."""

    def __init__(self, sizes: MeshSizes, *, timeout: timedelta = timedelta(minutes=10)):
        distributed = dist.is_initialized()
        self.sizes = sizes
        self.world = dist.get_world_size() if distributed else 1
        if prod((sizes.pp, sizes.dp, sizes.sp, sizes.tp)) != self.world:
            raise ValueError(f"layout of {sizes.world} ranks ({sizes}) started with {self.world} processes")
        self.rank = dist.get_rank() if distributed else 0
        self.place = sizes.coordinate(self.rank)
        self._ranks: dict[str, list[int]] = {}
        self._groups: dict[str, dist.ProcessGroup | None] = {}
        for name, axes in {"pp": ("pp",), "dp": ("dp", "sp"), "tp": ("tp",), "model": ("pp", "tp")}.items():
            for ranks in sizes.groups(*axes):
                # Every rank must take part in making every group, its own or not.
                group = dist.new_group(ranks, timeout=timeout) if distributed else None
                if self.rank in ranks:
                    self._ranks[name], self._groups[name] = ranks, group

    @property
    def pp_rank(self) -> int:
        return self.place["pp"]

    @property
    def dp_rank(self) -> int:
        """Index among the replicas that read different rows."""
        return self._ranks["dp"].index(self.rank)

    @property
    def dp(self) -> int:
        return len(self._ranks["dp"])

    def ranks(self, name: str) -> list[int]:
        """Global ranks of my group along `name` (pp, dp, tp, model)."""
        return self._ranks[name]

    def group(self, name: str) -> dist.ProcessGroup | None:
        """My process group along `name`; None in a single process."""
        return self._groups[name]

    def all_reduce(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Sum in place over my group along `name`."""
        if len(self._ranks[name]) > 1:
            dist.all_reduce(tensor, group=self._groups[name])
        return tensor

    # The interface DeepSpeed reads. get_model_parallel_rank must be the tensor-parallel rank: it decides who counts
    # parameters that tensor parallelism does not split in the gradient norm.
    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._groups["dp"]

    def get_data_parallel_world_size(self) -> int:
        return self.dp

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._groups["model"]

    def get_model_parallel_world_size(self) -> int:
        return self.sizes.pp * self.sizes.tp

    def get_model_parallel_rank(self) -> int:
        return self.place["tp"]

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._groups["tp"]

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.sizes.tp

    def get_tensor_model_parallel_rank(self) -> int:
        return self.place["tp"]

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._groups["pp"]

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.sizes.pp

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.pp_rank

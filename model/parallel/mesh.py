"""Process groups of the rank grid, and this process's place in it.

A `Mesh` is also the `mpu` DeepSpeed asks for; to it "data parallel" means every dense replica, dp x sp.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from model.parallel.collectives import Axis, collective
from model.parallel.grid import AXES, GROUPS, MeshSizes

__all__ = ["AXES", "GROUPS", "Mesh", "MeshSizes"]


class Mesh:
    """This process's place in the layout, and its process groups. Several ranks need torch.distributed.

    Args:
        node: ranks of a node, where all nodes have as many; None: messages take no notice of nodes.
    """

    def __init__(self, sizes: MeshSizes, *, timeout: timedelta = timedelta(minutes=10), node: int | None = None):
        distributed = dist.is_initialized()
        self.sizes, self.node = sizes, node
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
        for name, groups in sizes.all_groups(node).items():
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

    @property
    def replica(self) -> tuple[int, int]:
        """Index among the ranks that read different rows, and how many of those there are."""
        return self.dp_rank, self.dp

    def axis(self, name: str) -> Axis:
        """My group along `name`: pp, pp_back, dp, sp, tp, ep, replica (dp x sp), expert_replica, model (pp x tp), and
        ep_near, ep_far (`MeshSizes.dispatch_groups`)."""
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

"""The grid of ranks (pp, dp, sp, tp), as numbers alone; does not import torch.

tp is fastest: tensor-parallel peers sit next to each other, where links are fastest. EP is carved out of dp x sp:
neighbours among the replicas hold different experts.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def dispatch_sizes(self, node: int | None = None) -> tuple[int, int]:
        """Ranks of the two steps to experts: of one node, and of as many nodes. Without expert parallelism one each.

        An expert group and its tensor-parallel peers are neighbours; where whole nodes do not make them up, they count
        as one node.

        Args:
            node: ranks of a node; None: all are on one.
        """
        together = self.ep * self.tp if self.ep > 1 else 1
        near = node if node and together % node == 0 and node % self.tp == 0 else together
        return near, together // near

    def dispatch_groups(self, node: int | None = None) -> dict[str, list[list[int]]]:
        """Of those steps: ranks of one node (`ep_near`), and ranks in the same place of different nodes (`ep_far`)."""
        near, far = self.dispatch_sizes(node)
        nodes = [range(start, start + near) for start in range(0, self.world, near)]
        together = [nodes[i : i + far] for i in range(0, len(nodes), far)]
        across = [list(ranks) for some in together for ranks in zip(*some, strict=True)]
        return {"ep_near": [list(ranks) for ranks in nodes], "ep_far": across}

    def all_groups(self, node: int | None = None) -> dict[str, list[list[int]]]:
        """Every kind of process group by name, on nodes of `node` ranks."""
        named = {name: self.groups(*axes) for name, axes in GROUPS.items()}
        experts = {"ep": self.expert_groups(), "expert_replica": self.expert_replica_groups()}
        return named | experts | self.dispatch_groups(node)

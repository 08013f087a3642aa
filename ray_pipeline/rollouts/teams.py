"""Which training ranks answer together. Every team answers its share of the questions, and one of its ranks tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from model.parallel.gather import all_ranks_gather
from model.parallel.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True)
class Teams:
    """Ranks that answer together.

    Attributes:
        index: of this rank's team. leaders: a rank of each team, in order of the teams.
    """

    mesh: Mesh
    index: int
    leaders: tuple[int, ...]

    def share(self, items: Sequence[T]) -> list[T]:
        """Those of the items that this rank's team answers."""
        return list(items[self.index :: len(self.leaders)])

    def joined(self, mine: list[T]) -> list[T]:
        """What all teams made of their shares, in the order of the items, on every rank."""
        said = all_ranks_gather(self.mesh, mine if self.mesh.rank in self.leaders else None)
        parts: list[list[T]] = [said[rank] for rank in self.leaders]
        total, count = sum(map(len, parts)), len(parts)
        return [parts[i % count][i // count] for i in range(total)]


def each_alone(mesh: Mesh) -> Teams:
    """Every rank holds the whole model."""
    return Teams(mesh, mesh.rank, tuple(range(mesh.world)))


def replicas(mesh: Mesh) -> Teams:
    """The ranks of a replica, cut over pp and tp, hold a model together; its first rank tells."""
    return Teams(mesh, mesh.axis("replica").index, tuple(mesh.sizes.groups("dp", "sp")[0]))

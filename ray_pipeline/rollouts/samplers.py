"""Rollout engines: where answers are sampled. Knows nothing of rewards, and of Ray only by name.

Every training rank calls an engine alike. Requests are cut into shares of a fixed size, and each share is decoded by
itself: whoever decodes it, and however many do, the answers are the same bit for bit (as long as they compute with as
many threads). So are the weights behind them, which a checksum shows at every synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from model.generate.decode import Completion
from model.parallel.gather import all_ranks_gather
from model.parallel.mesh import Mesh
from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.records.artifacts import weights_digest
from ray_pipeline.rollouts.rollout import SampleRequest
from ray_pipeline.rollouts.teams import Teams

# Answers decoded together. With two cores 128 rows cost a third more than 256 at once; fewer than 64 are not worth
# sharing out.
FEWEST_ROWS, MOST_ROWS = 64, 256
T = TypeVar("T")


class Sampler(Protocol):
    """Holds weights and answers with them, in one process."""

    def take(self, state: Mapping[str, Tensor]) -> str:
        """Use these whole weights (fp32, by name) from now on; the checksum of what it then holds."""
        ...

    def sample(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """One answer to each request, in order; they are decoded together."""
        ...

    def idle(self) -> None:
        """Called when it has answered all that it is asked for now; see `Decoder.idle`."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class RolloutEngine(Protocol):
    """Samplers wherever they are. Called on every training rank alike, with the same arguments."""

    def sync(self, state: Mapping[str, Tensor], version: int) -> str:
        """Give the samplers the trainer's whole weights.

        Args:
            version: number of the weights; grows.
        Returns:
            The checksum of what every sampler now holds; where they differ, of one that has other weights.
        """
        ...

    def submit(self, requests: Sequence[SampleRequest]) -> Any:
        """Begin to sample; what `collect` takes."""
        ...

    def collect(self, handle: Any) -> list[Completion]:
        """Wait for the answers, in the order of the requests."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def synchronise(engine: RolloutEngine, state: Mapping[str, Tensor], version: int) -> None:
    """Bring the engine to these weights and make sure that it has them.

    Raises:
        StageFailed: what it holds afterwards is something else.
    """
    wanted, held = weights_digest(state), engine.sync(state, version)
    if held != wanted:
        raise StageFailed(
            f"rollouts would be sampled with other weights than the trainer's: after synchronisation {version} the "
            f"engine's checksum is {held}, the trainer's {wanted}"
        )


def from_main(mesh: Mesh, make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; a UserError or StageFailed of its making is raised on all of them."""
    outcome: list[Any] = [None, None]
    if mesh.rank == 0:
        try:
            outcome = [make(), None]
        except (UserError, StageFailed) as error:
            outcome = [None, error]
    if mesh.world > 1:
        dist.broadcast_object_list(outcome, 0)
    value, failure = outcome
    if failure is not None:
        raise failure
    return value


def share_rows(answers: int, samplers: int) -> int:
    """How many of the answers of a step are decoded together, so that every sampler has its share.

    A matrix product rounds otherwise with another number of rows: it depends on nothing that may change while a run
    keeps its layout.
    """
    return min(max(-(-answers // samplers), FEWEST_ROWS), MOST_ROWS)


def shares(requests: Sequence[SampleRequest], rows: int) -> list[list[SampleRequest]]:
    """The requests in order, `rows` at a time."""
    return [list(requests[start : start + rows]) for start in range(0, len(requests), rows)]


class InRankEngine:
    """The training ranks answer, between updates: each with a whole model of its own, or in teams with their shards."""

    def __init__(self, teams: Teams, sampler: Sampler, share_rows: int):
        self.teams, self.sampler, self.share_rows = teams, sampler, share_rows

    def sync(self, state: Mapping[str, Tensor], version: int) -> str:
        own = self.sampler.take(state)
        held = all_ranks_gather(self.teams.mesh, own)
        return next((other for other in held if other != own), own)

    def submit(self, requests: Sequence[SampleRequest]) -> list[list[SampleRequest]]:
        return shares(requests, self.share_rows)

    def collect(self, handle: list[list[SampleRequest]]) -> list[Completion]:
        mine = [self.sampler.sample(share) for share in self.teams.share(handle)]
        self.sampler.idle()
        return [answer for answers in self.teams.joined(mine) for answer in answers]

    def close(self) -> None:
        self.sampler.close()

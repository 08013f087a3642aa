"""Messages between the pipeline ranks of one run: sent without waiting, received in the order in which they are sent.

Every rank knows all ranks' orders, so nothing but tensors travels. Messages to higher ranks and to lower ranks have a
connection each; two stages on one rank hand tensors over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.collectives import Axis, collective
from model.parallel.mesh import Mesh
from ray_pipeline.engine.pipeline.schedule import Message, Schedule


class Route(NamedTuple):
    """Between which pipeline ranks a message travels, and the places in their orders that make and need it."""

    source: int
    target: int
    made: int
    needed: int


@lru_cache(maxsize=64)
def routes(schedule: Schedule) -> dict[Message, Route]:
    """Every message of a schedule; those of one source in the order in which it makes them."""
    needed = {
        message: index
        for order in schedule.actions
        for index, action in enumerate(order)
        if (message := schedule.needs(action)) is not None
    }
    return {
        message: Route(rank, schedule.rank_of[message.stage], index, needed[message])
        for rank, order in enumerate(schedule.actions)
        for index, action in enumerate(order)
        if (message := schedule.makes(action)) is not None
    }


class _Sent(NamedTuple):
    message: Message
    needed: int
    tensors: list[Tensor]  # must live until the message has arrived
    works: list[Any]


class Mailbox:
    """One rank's messages of one run of a schedule.

    Args:
        shapes: per micro-batch, the shapes of the tensors that travel.
    """

    def __init__(self, schedule: Schedule, mesh: Mesh, device: torch.device, shapes: list[list[tuple[int, ...]]]):
        self.mesh, self.device, self.shapes, self.rank = mesh, device, shapes, mesh.pp_rank
        self._routes = routes(schedule)
        self._here: dict[Message, list[Tensor]] = {}
        self._sent: dict[int, deque[_Sent]] = {}
        self._receiving: dict[Message, tuple[list[Tensor], list[Any]]] = {}
        self._expected: dict[int, deque[Message]] = {}
        for message, route in self._routes.items():
            if route.target == self.rank != route.source:
                self._expected.setdefault(route.source, deque()).append(message)

    def send(self, message: Message, tensors: list[Tensor]) -> None:
        """Give tensors to the rank that needs them; they must not be changed afterwards."""
        route = self._routes[message]
        if route.target == self.rank:
            self._here[message] = tensors
            return
        axis, peer = _connection(self.mesh, self.rank, route.target)
        tensors = [tensor.contiguous() for tensor in tensors]
        with collective(axis, f"send of the {message}"):
            works = [dist.isend(tensor, peer, group=axis.group) for tensor in tensors]
        self._sent.setdefault(route.target, deque()).append(_Sent(message, route.needed, tensors, works))

    def expect(self, message: Message) -> None:
        """Start receiving a message, and before it all that its sender sends earlier."""
        route = self._routes[message]
        if route.source == self.rank or message in self._receiving:
            return
        axis, peer = _connection(self.mesh, route.source, self.rank)
        while message not in self._receiving:
            following = self._expected[route.source].popleft()
            tensors = [torch.empty(shape, device=self.device) for shape in self.shapes[following.micro_batch]]
            with collective(axis, f"receive of the {following}"):
                works = [dist.irecv(tensor, peer, group=axis.group) for tensor in tensors]
            self._receiving[following] = (tensors, works)

    def take(self, message: Message) -> list[Tensor]:
        """Wait for a message."""
        if message in self._here:
            return self._here.pop(message)
        self.expect(message)
        route = self._routes[message]
        tensors, works = self._receiving[message]
        axis, _ = _connection(self.mesh, route.source, self.rank)
        with collective(axis, f"receive of the {message}"):
            for work in works:
                work.wait()
        del self._receiving[message]
        # The sender has come as far as `made`, so what it needed until then has arrived there.
        self._release(route.source, route.made)
        return tensors

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        assert not self._here and not self._receiving and not any(self._expected.values())
        for peer in self._sent:
            self._release(peer, None)

    def _release(self, peer: int, reached: int | None) -> None:
        sent = self._sent.get(peer, deque())
        axis, _ = _connection(self.mesh, self.rank, peer)
        while sent and (reached is None or sent[0].needed <= reached):
            with collective(axis, f"send of the {sent[0].message}"):
                for work in sent[0].works:
                    work.wait()
            sent.popleft()


def _connection(mesh: Mesh, source: int, target: int) -> tuple[Axis, int]:
    """Axis whose group carries messages from pipeline rank `source` to `target`, and the other end's global rank."""
    axis = mesh.axis("pp" if source < target else "pp_back")
    return axis, axis.ranks[target if source == mesh.pp_rank else source]


def connect(mesh: Mesh, rank_of: tuple[int, ...], device: torch.device) -> None:
    """One tiny message over every connection that stages of this placement use, one after the other.

    NCCL opens a connection at its first message, where both ends wait for each other: in the midst of a schedule that
    could make ranks wait in a circle.
    """
    pairs = {(a, b) for a, b in pairwise(rank_of) if a != b}
    for source, target in sorted(pairs | {(b, a) for a, b in pairs}):
        if mesh.pp_rank in (source, target):
            axis, peer = _connection(mesh, source, target)
            exchange: Callable[..., Any] = dist.send if mesh.pp_rank == source else dist.recv
            with collective(axis, "first message"):
                exchange(torch.zeros(1, device=device), peer, group=axis.group)

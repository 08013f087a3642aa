"""Plays a schedule against the clock: does it end, when, and what does it hold. No tensors, no processes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from ray_pipeline.engine.pipeline.schedule import Action, Message, Schedule

Time = int | float | Fraction


@dataclass(frozen=True)
class Costs:
    """How long things take, in any unit; by default a backward, and its halves together, are worth two forwards.

    Attributes:
        message: from the end of an action until a neighbour on another rank can use its result.
        stages: weight of each stage, which multiplies its actions; None where all are equal.
    """

    forward: Time = 1
    backward: Time = 2
    input_gradient: Time = 1
    weight_gradient: Time = 1
    message: Time = 0
    stages: tuple[Time, ...] | None = None

    def of(self, action: Action) -> Time:
        """Duration of one action."""
        per_kind = {"F": self.forward, "B": self.backward, "I": self.input_gradient, "W": self.weight_gradient}
        return per_kind[action.kind] * (1 if self.stages is None else self.stages[action.stage])


@dataclass(frozen=True)
class Simulation:
    """What happened, per pipeline rank.

    Attributes:
        finish: when the last rank is done. busy: time spent computing.
        peak_activations: most micro-batches of a part held at once, summed over the rank's parts; held from the
            forward to the backward, or to its weight half.
    """

    finish: Time
    busy: tuple[Time, ...]
    peak_activations: tuple[int, ...]

    @property
    def bubble(self) -> tuple[Time, ...]:
        """Share of the whole time that each rank idles."""
        return tuple(1 - busy / self.finish for busy in self.busy)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Every rank does its actions in order, each as soon as what it needs has arrived.

    Raises:
        ValueError: a deadlock, naming the actions that wait forever; or a backward without its forward.
    """
    costs = costs or Costs()
    arrived: dict[Message, Time] = {}
    clock: list[Time] = [0] * schedule.pp
    done = [0] * schedule.pp
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.actions):
            while done[rank] < len(order):
                action = order[done[rank]]
                message = schedule.needs(action)
                if message is not None and message not in arrived:
                    break
                clock[rank] = max(clock[rank], arrived[message] if message is not None else 0) + costs.of(action)
                made = schedule.makes(action)
                if made is not None:
                    away = schedule.rank_of[made.stage] != rank
                    arrived[made] = clock[rank] + (costs.message if away else 0)
                done[rank] += 1
                moved = True
    stuck = [f"rank {r} at {order[done[r]]}" for r, order in enumerate(schedule.actions) if done[r] < len(order)]
    if stuck:
        raise ValueError(f"schedule {schedule.name} with pp={schedule.pp} is stuck: {', '.join(stuck)}")
    busy = tuple(sum(costs.of(action) for action in order) for order in schedule.actions)
    return Simulation(max(clock), busy, tuple(peak_activations(order) for order in schedule.actions))


def peak_activations(order: tuple[Action, ...]) -> int:
    """Most activations alive at once in one rank's order.

    Raises:
        ValueError: a backward before its forward, a weight gradient before the input gradient, or one done twice.
    """
    alive: dict[tuple[int, int], str] = {}
    peak = 0
    follows: dict[str, str | None] = {"F": None, "B": "F", "I": "F", "W": "I"}
    for action in order:
        key = (action.stage, action.micro_batch)
        if alive.get(key) != follows[action.kind]:
            before = follows[action.kind] or "nothing"
            raise ValueError(f"{action} after {alive.get(key)}: only {before} can come before it")
        if action.kind in ("B", "W"):
            del alive[key]
        else:
            alive[key] = action.kind
        peak = max(peak, len(alive))
    return peak

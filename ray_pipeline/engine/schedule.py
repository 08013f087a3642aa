"""Pipeline schedules as data: what every pipeline rank does, in order. No tensors, no processes.

A schedule holds the orders of all ranks, so each of them knows what its neighbours send it and when.

1f1b (PipeDream-Flush, arXiv:2006.09503) has one stage per rank, the others two. interleaved_1f1b (arXiv:2104.04473)
shortens the bubble for more messages; zbv (arXiv:2401.10241, memory in arXiv:2405.15362) fills it with weight
gradients, which nobody waits for; dualpipev (DeepSeek-V3's DualPipe folded into a V) pairs each forward with a
backward of another micro-batch. Here the two of a pair run one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, cast

from model.parallel.placement import V_SHAPED, num_stages, parts_of, ranks_of

Kind = Literal["F", "B", "I", "W"]
"""Forward; whole backward; its input-gradient half, which the previous stage waits for; its weight-gradient half."""


class Action(NamedTuple):
    """One step of one pipeline rank. `stage` is the global index of a model part."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, micro-batch {self.micro_batch})"


class Message(NamedTuple):
    """What `stage` needs from its neighbour: the activation for a forward, its output's gradient for a backward."""

    forward: bool
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        what = "activation" if self.forward else "gradient"
        return f"{what} for stage {self.stage}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """Orders of all pipeline ranks.

    Attributes:
        rank_of: pipeline rank of each stage. actions: per pipeline rank, in order of execution.
    """

    name: str
    pp: int
    stages: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def splits_backward(self) -> bool:
        """Whether some backwards are cut into their two halves."""
        return any(action.kind == "I" for order in self.actions for action in order)

    def needs(self, action: Action) -> Message | None:
        """What must have arrived from another stage before `action` can start."""
        if action.kind == "W" or (action.kind == "F" and action.stage == 0):
            return None
        if action.kind != "F" and action.stage == self.stages - 1:
            return None
        return Message(action.kind == "F", action.stage, action.micro_batch)

    def makes(self, action: Action) -> Message | None:
        """What `action` gives to another stage."""
        stage = action.stage + (1 if action.kind == "F" else -1)
        if action.kind == "W" or not 0 <= stage < self.stages:
            return None
        return Message(action.kind == "F", stage, action.micro_batch)


@lru_cache(maxsize=64)
def build_schedule(name: str, pp: int, micro_batches: int) -> Schedule:
    """Forwards and backwards of one optimizer step.

    Raises:
        ValueError: dualpipev with fewer than 2 * pp micro-batches.
    """
    assert pp >= 1 and micro_batches >= 1
    if name == "dualpipev" and micro_batches < 2 * pp:
        raise ValueError(
            f"schedule=dualpipev with {micro_batches} micro-batch{'es' if micro_batches > 1 else ''} per step: it "
            f"needs at least 2 x pp_size = {2 * pp}. Use a smaller micro_batch, a larger batch, or --schedule zbv."
        )
    order = _ORDERS[name]
    return _schedule(name, pp, micro_batches, [order(pp, rank, micro_batches) for rank in range(pp)])


@lru_cache(maxsize=64)
def forward_only(name: str, pp: int, micro_batches: int) -> Schedule:
    """Every micro-batch forward, on the same placement: evaluation, reference models, teachers."""
    assert pp >= 1 and micro_batches >= 1
    stages = num_stages(name, pp)

    def start(action: Action) -> int:
        """When it runs if every stage takes 1: no two stages of a rank ever meet in a time slot."""
        if name in V_SHAPED:
            return 2 * action.micro_batch + action.stage
        round_, place = divmod(action.micro_batch, pp)
        return round_ * stages + place + action.stage

    orders = [
        sorted((Action("F", s, m) for s in parts_of(name, pp, rank) for m in range(micro_batches)), key=start)
        for rank in range(pp)
    ]
    return _schedule(name, pp, micro_batches, orders)


def _schedule(name: str, pp: int, micro_batches: int, orders: list[list[Action]]) -> Schedule:
    # Orders may be made for more micro-batches than there are: what is left after leaving some out still fits.
    kept = tuple(tuple(action for action in order if action.micro_batch < micro_batches) for order in orders)
    return Schedule(name, pp, num_stages(name, pp), ranks_of(name, pp), kept)


def _one_forward_one_backward(pp: int, rank: int, micro_batches: int) -> list[Action]:
    """At most `pp - rank` activations are alive."""
    order = _Order(parts_of("1f1b", pp, rank))
    warmup = min(pp - 1 - rank, micro_batches)
    order.add(warmup, "F0")
    order.add(micro_batches - warmup, "F0 B0")
    order.add(warmup, "B0")
    return order.actions


def _interleaved(pp: int, rank: int, micro_batches: int) -> list[Action]:
    """Micro-batches go in rounds of `pp` or a little more through the first parts of all ranks, then the second.

    Rounds of fewer would leave ranks idle; even ones, larger than `pp` where it does not divide, keep the formula's
    bubble for every number of micro-batches from `pp` on. At most round + 2 * (pp - 1 - rank) + 1 are alive.
    """
    parts = parts_of("interleaved_1f1b", pp, rank)
    rounds = max(1, micro_batches // pp)
    cuts = [-(-micro_batches * r // rounds) for r in range(rounds + 1)]
    turns = [(part, i) for start, stop in pairwise(cuts) for part in (0, 1) for i in range(start, stop)]
    forwards = [Action("F", parts[part], micro_batch) for part, micro_batch in turns]
    backwards = [Action("B", parts[1 - part], micro_batch) for part, micro_batch in turns]
    # The last rank needs a round of its first part before it can start on the second; each rank before it two more
    # forwards, to cover the way there and back.
    warmup = min(cuts[1] + 2 * (pp - 1 - rank), len(turns))
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(turns) - warmup :]


def _zero_bubble_v(pp: int, rank: int, micro_batches: int) -> list[Action]:
    """The tip of the V is on the last rank; at most `2 * pp` activations of (half-sized) parts are alive."""
    order = _Order(parts_of("zbv", pp, rank))
    count = max(micro_batches, 2 * pp - 1)
    order.add(2 * (pp - rank) - 1, "F0")
    order.add(rank, "F1 F0")
    order.add(pp - rank, "F1 I1 W1")
    order.add(count - 2 * pp + rank + 1, "F0 I0 W0 F1 I1 W1")
    order.add(pp - rank - 1, "I0 W0 F1 I1 W1")
    order.add(rank, "I0 I1")
    order.add(pp - rank, "I0 W0")
    order.add(rank, "W1")
    order.add(rank, "W0")
    return order.actions


def _dual_pipe_v(pp: int, rank: int, micro_batches: int) -> list[Action]:
    """DualPipeV (github.com/deepseek-ai/DualPipe): whole backwards in the middle, halves where they fill a bubble."""
    order = _Order(parts_of("dualpipev", pp, rank))
    left = pp - rank - 1  # ranks between this one and the tip
    order.add(2 * left, "F0")
    order.add(rank + 1, "F0 F1")
    order.add(left, "I1 W* F1")
    order.add(micro_batches - 2 * pp + rank + 1, "F0 B1 F1 B0")
    order.add(left, "B1 F1 B0")
    # Of the last 2 * (rank + 1) backwards below the tip, the later half leave their weight gradients for the end.
    whole = rank + 1
    order.add(whole // 2, "B1 B0")
    order.add(whole % 2, "B1 I0")
    order.add(rank + 1 - whole // 2 - whole % 2, "I1 I0")
    order.add(left, "W* I0")
    order.add(order.pending, "W*")
    return order.actions


class _Order:
    """Writes one rank's order as repeated patterns. "F0" is the next forward of its first part, "W*" the oldest
    weight gradient still to be done."""

    def __init__(self, parts: list[int]):
        self.parts = parts
        self.actions: list[Action] = []
        self._next: Counter[str] = Counter()
        self._owed: list[tuple[int, int]] = []

    @property
    def pending(self) -> int:
        """Weight gradients still to be done."""
        return len(self._owed)

    def add(self, times: int, pattern: str) -> None:
        for _ in range(times):
            for token in pattern.split():
                self._add(token)

    def _add(self, token: str) -> None:
        kind, part = cast(Kind, token[0]), token[1]
        if kind == "W":
            wanted = (s for s, _ in self._owed) if part == "*" else iter([self.parts[int(part)]])
            stage = next(wanted)
            owed = next(entry for entry in self._owed if entry[0] == stage)
            self._owed.remove(owed)
            self.actions.append(Action("W", *owed))
            return
        # Whole and halved backwards of a part count through the same micro-batches.
        counter = ("F" if kind == "F" else "B") + part
        action = Action(kind, self.parts[int(part)], self._next[counter])
        self._next[counter] += 1
        self.actions.append(action)
        if kind == "I":
            self._owed.append((action.stage, action.micro_batch))


_ORDERS: dict[str, Callable[[int, int, int], list[Action]]] = {
    "1f1b": _one_forward_one_backward,
    "interleaved_1f1b": _interleaved,
    "zbv": _zero_bubble_v,
    "dualpipev": _dual_pipe_v,
}

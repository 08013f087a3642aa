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
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, cast

from model.parallel.placement import V_SHAPED, num_stages, parts_of, ranks_of

Kind = Literal["F", "B", "I", "W"]
"""Forward; whole backward; its input-gradient half, which the previous stage waits for; its weight-gradient half."""


def least_micro_batches(schedule: str, pp: int) -> int:
    """Micro-batches of a replica that a training step needs."""
    return 2 * pp if schedule == "dualpipev" else 1


def rows_needed(rows: int, dp: int, at_once: int, micro_batches: int) -> int:
    """The fewest rows from `rows` on that dp replicas share evenly, in at least so many micro-batches of `at_once`."""
    return max(-(-rows // dp), (micro_batches - 1) * at_once + 1) * dp


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


@dataclass(frozen=True, eq=False)
class Schedule:
    """Orders of all pipeline ranks. Equal only to itself: comparing thousands of actions for a look-up takes long.

    Attributes:
        rank_of: pipeline rank of each stage. actions: per pipeline rank, in order of execution.
    """

    name: str
    pp: int
    stages: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @cached_property
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
    orders = []
    for rank in range(pp):
        parts = parts_of(name, pp, rank)
        if name in V_SHAPED:
            # In the order in which they start if every stage takes 1; a rank's two stages never want the same moment.
            turns = sorted((2 * i + stage, stage, i) for stage in parts for i in range(micro_batches))
            orders.append([Action("F", stage, i) for _, stage, i in turns])
        elif len(parts) == 2:
            orders.append([Action("F", parts[part], i) for part, i in _turns(pp, micro_batches)])
        else:
            orders.append([Action("F", parts[0], i) for i in range(micro_batches)])
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


def _rounds(pp: int, micro_batches: int) -> list[range]:
    """Micro-batches in rounds of `pp`, or a little more where it does not divide: with fewer, ranks would idle."""
    rounds = max(1, micro_batches // pp)
    cuts = [-(-micro_batches * r // rounds) for r in range(rounds + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _turns(pp: int, micro_batches: int) -> list[tuple[int, int]]:
    """(part, micro-batch): each round goes through the first parts of all ranks, then through the second."""
    return [(part, i) for round_ in _rounds(pp, micro_batches) for part in (0, 1) for i in round_]


def _interleaved(pp: int, rank: int, micro_batches: int) -> list[Action]:
    """At most largest round + 2 * (pp - 1 - rank) + 1 activations of (half-sized) parts are alive."""
    parts, turns = parts_of("interleaved_1f1b", pp, rank), _turns(pp, micro_batches)
    forwards = [Action("F", parts[part], micro_batch) for part, micro_batch in turns]
    backwards = [Action("B", parts[1 - part], micro_batch) for part, micro_batch in turns]
    # The last rank needs a round of its first part before it can start on the second; each rank before it two more
    # forwards, to cover the way there and back.
    warmup = min(len(_rounds(pp, micro_batches)[0]) + 2 * (pp - 1 - rank), len(turns))
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

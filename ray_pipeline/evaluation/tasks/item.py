"""What a task is made of. No files, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Way = Literal["answers", "options", "harness"]


class Problem(NamedTuple):
    """A made question and its exact answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique within the task, the same in every evaluation with the same settings; a paired test goes by it.
        prompt: what the user says. reference: the right answer, as the task's scoring reads it.
        difficulty: 1 (easiest) to 5; 0 where it is unknown.
        options: what can be chosen, for tasks that go by the likelihood of each; `reference` is then one of them.
        data: what else the scoring needs.
    """

    id: str
    prompt: str
    reference: str
    category: str = ""
    difficulty: int = 0
    options: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict, compare=False)


class Scoring:
    """Marks answers. Used as a context, so that one may hold processes while it works; this one holds nothing."""

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def score(self, items: Sequence[Item], texts: Sequence[str]) -> list[float | None]:
        """0.0 to 1.0 for each answer, where 1.0 is right; None where the scoring itself failed.

        Raises:
            UserError: it fails too often to be believed.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Task:
    """Questions and how they are marked.

    Attributes:
        way: "answers": the model writes and `scoring` marks; "options": the likeliest of each item's options is its
            answer; "harness": lm-evaluation-harness asks by itself (`harness` has what it needs).
        votes: whether answers can be compared with each other, so that a majority exists (programs cannot).
    """

    name: str
    items: list[Item]
    scoring: Scoring | None = None
    way: Way = "answers"
    votes: bool = True
    harness: Any = None


@dataclass(frozen=True)
class Request:
    """What a task is asked for.

    Attributes:
        argument: what stands behind the colon of the task's name, a path or a name; None without one.
        seed: of generated questions. limit: how many questions at most; None for the task's own number.
        difficulties: levels wanted; None for all.
        heldout: the evaluated run's own questions; None where the model is not of a run.
        needs_landlock: programs are not run where the kernel has none.
    """

    argument: str | None = None
    seed: int = 0
    limit: int | None = None
    difficulties: tuple[int, ...] | None = None
    heldout: Path | None = None
    needs_landlock: bool = True

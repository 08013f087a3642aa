"""What a tracker is: somewhere else that people look at a stage's figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Kind = Literal["train", "val"]
SHOWN = ("prompt", "completion", "answer", "correct", "well_formed", "tokens", "finished")  # columns of samples
Verdict = Literal["DONE", "LEARNED NOTHING", "FAILED"]


@dataclass(frozen=True)
class TrackedRun:
    """One stage of one run, as trackers name it.

    Attributes:
        folder: the stage's. run_id: the same over every resume. group: the run's name. name: tells stages and reruns
            with other settings apart.
        config: settings, versions, commit, digests of what is read. upstream: stage -> digest of its weights or data.
        spent: US dollars of the whole run so far; None where no price is known.
    """

    folder: Path
    stage: str
    name: str
    run_id: str
    group: str
    project: str
    entity: str | None
    config: Mapping[str, Any]
    upstream: Mapping[str, str] = field(default_factory=dict)
    spent: Callable[[], float | None] = lambda: None


@dataclass(frozen=True)
class Ending:
    """How the stage ended.

    Attributes:
        figures: final ones and baselines, with the parameter count. outputs: name -> folder of what it made.
        digest: of its weights, or its data.
    """

    verdict: Verdict
    exit_code: int
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, Path] = field(default_factory=dict)
    digest: str | None = None

    def summary(self) -> dict[str, Any]:
        """All of it, flat."""
        told = {"verdict": self.verdict, "exit_code": self.exit_code}
        return told | ({"reason": self.reason} if self.reason else {}) | dict(self.figures)


class Tracker(Protocol):
    """Called from one thread. May raise anything at any time, and take as long as it likes: nobody waits for it."""

    def open(self, run: TrackedRun) -> Mapping[Kind, int]:
        """Begin, or go on with the run of this id.

        Returns:
            The last steps of which it has figures of training and of an evaluation; none where it begins anew.
        """
        ...

    def log(self, step: int, kind: Kind, figures: Mapping[str, Any]) -> None:
        """Figures at `step`, which never goes back within a kind: numbers, or a list of numbers (loads of experts)."""
        ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Questions and answers of the evaluation at `step`."""
        ...

    def alert(self, step: int, title: str, text: str) -> None:
        """Something a person should look at."""
        ...

    def finish(self, ending: Ending) -> None:
        """The stage has ended; everything is there when this returns."""
        ...


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Those that are single numbers."""
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


def lists(figures: Mapping[str, Any]) -> dict[str, list[float]]:
    """Those that are lists of numbers."""
    return {name: value for name, value in figures.items() if isinstance(value, list)}

"""What containers are given and what they give back. Plain data, which travels; no modal here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ray_pipeline.settings.schema import TRAINING_STAGES

Place = Literal["cpu", "gpu"]  # the function that a stage runs in


def place_of(stage: str) -> Place:
    """Training needs GPUs; preparing data and exporting do not."""
    return "gpu" if stage in TRAINING_STAGES else "cpu"


@dataclass(frozen=True)
class Job:
    """One call of `run` or `resume`, as containers get it.

    Attributes:
        settings: the recipe as YAML, whole, with inputs where they lie on the volume.
        stored: the settings as the user's machine has them, kept as the run's own.
        stages: fields of `StageSelection`. asked: Unix seconds; a stage that a flag makes run again does so once.
        volume: its name. runs_dir: where it is mounted. device: of the ranks that train.
        hosts: containers that train together. deadline: Unix seconds after which nothing is rented any more.
    """

    run: str
    settings: str
    stored: str
    stages: dict[str, Any]
    volume: str
    runs_dir: str
    device: Literal["cpu", "cuda"]
    asked: float
    deadline: float
    by: str
    hosts: int = 1
    resume: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a piece of a run, or the run, ended.

    Attributes:
        exit_code: as the command line's. error: one message. user_error: whether it is the user's to fix.
        next: where what is left runs; None: nothing is left. moved: id of the call that goes on in place of this one.
    """

    exit_code: int
    error: str | None = None
    user_error: bool = False
    next: Place | None = None
    moved: str | None = None


@dataclass
class State:
    """What is known of a run on Modal, by everybody who asks. Kept as a dict, so that other versions can read it.

    Attributes:
        call: id of the call that runs it. piece: of the one in which stages run now. place, phase: where and what.
        saved: the newest checkpoint that is on the volume. outcome: how it ended.
    """

    run: str
    call: str = ""
    app: str = ""
    volume: str = ""
    what: str = ""
    by: str = ""
    since: float = 0.0
    updated: float = 0.0
    piece: str = ""
    place: str = ""
    phase: str = "waiting for a container"
    saved: str = ""
    exit_code: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether the run came to an end, good or bad."""
        return bool(self.outcome)

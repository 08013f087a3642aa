"""Which trackers there are, whether they are installed, and all of a stage's together."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ray_pipeline.errors import UserError
from ray_pipeline.records.trackers.follower import Follower
from ray_pipeline.records.trackers.tracker import Ending, TrackedRun
from ray_pipeline.settings.schema import TrackingConfig

LOG = logging.getLogger(__name__)
FINISH_SECONDS = 60.0  # that the end of a stage waits for what is not sent yet


@dataclass(frozen=True)
class Known:
    """A tracker that can be named. package: what must be importable; extra: of this project, which brings it."""

    title: str
    module: str
    type_name: str
    package: str
    extra: str


KNOWN: Mapping[str, Known] = {
    "wandb": Known("Weights & Biases", "wandb_tracker", "WandbTracker", "wandb", "wandb"),
    "trackio": Known("Trackio", "trackio_tracker", "TrackioTracker", "trackio", "trackio"),
    "tensorboard": Known("TensorBoard", "tensorboard_tracker", "TensorBoardTracker", "tensorboardX", "tensorboard"),
    "mlflow": Known("MLflow", "mlflow_tracker", "MlflowTracker", "mlflow", "mlflow"),
}


def wanted(settings: TrackingConfig) -> list[str]:
    """Names of those that the settings turn on."""
    return [name for name in KNOWN if getattr(settings, name)]


def check_trackers(settings: TrackingConfig) -> None:
    """Refuse what is not installed.

    Raises:
        UserError: names the extra.
    """
    for name in wanted(settings):
        known = KNOWN[name]
        if importlib.util.find_spec(known.package) is None:
            raise UserError(
                f"tracking.{name}=true: {known.title} is not installed (no package {known.package}). Install it with "
                f"`pip install 'ray-pipeline[{known.extra}]'`, or set tracking.{name}=false."
            )


class Tracking:
    """The trackers of one stage, from its start to its end. Nothing here raises, or waits longer than it says."""

    def __init__(self, settings: TrackingConfig, run: TrackedRun):
        self.run = run
        self.followers = [Follower(_maker(KNOWN[name]), KNOWN[name].title, run) for name in wanted(settings)]

    def start(self) -> Tracking:
        """Begin to follow the stage."""
        for follower in self.followers:
            follower.start()
        return self

    def finish(self, ending: Ending, *, seconds: float = FINISH_SECONDS) -> None:
        """Send the rest and how it ended; what does not arrive within `seconds` is told with its count."""
        deadline = time.monotonic() + seconds
        for follower in self.followers:
            follower.end(ending)
        for follower in self.followers:
            follower.join(max(0.0, deadline - time.monotonic()))
            lost = follower.missing() if follower.failed or follower.is_alive() else 0
            if lost or follower.is_alive():
                why = "" if follower.failed else f" within {seconds:.0f} s"
                LOG.warning(
                    "%s: %d lines of figures did not reach %s%s; they are in metrics.jsonl", self.run.stage, lost,
                    follower.title, why,
                )  # fmt: skip


def _maker(known: Known):  # type: ignore[no-untyped-def]
    """Imports the tracker's package in the thread that uses it: that can take seconds, or fail."""

    def make() -> object:
        module = importlib.import_module(f"ray_pipeline.records.trackers.{known.module}")
        return getattr(module, known.type_name)()

    return make

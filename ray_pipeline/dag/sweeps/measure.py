"""By which figure of which stage settings are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ray_pipeline.dag.ledger import Record
from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.settings.chain import trained
from ray_pipeline.settings.schema import STAGES, TRAINING_STAGES, PipelineFields

Mode = Literal["min", "max"]
# What a stage reaches by itself: figure, and what it is called.
OWN: Mapping[str, tuple[str, Mode, str]] = {
    "pretrain": ("validation_loss", "min", "held-out loss in nats"),
    "sft": ("accuracy", "max", "held-out accuracy"),
    "dpo": ("preference_accuracy", "max", "held-out preference accuracy"),
    "grpo": ("accuracy", "max", "held-out accuracy"),
    "distillation": ("accuracy", "max", "held-out accuracy"),
}
_LESS = ("loss", "divergence", "seconds", "kl", "gap", "dropped_tokens")
_MORE = ("accuracy", "reward", "agreement")


@dataclass(frozen=True)
class Measure:
    """A stage's figure. mode: whether less or more of it is better. title: with its unit."""

    stage: str
    name: str
    mode: Mode
    title: str

    @property
    def text(self) -> str:
        """As `--metric` takes it."""
        return f"{self.stage}.{self.name}:{self.mode}"


def last_stage(config: PipelineFields, until: str | None) -> str:
    """The last stage that trains, up to `until`.

    Raises:
        UserError: no such stage in this run, or none that trains.
    """
    stages = trained(config)
    if until is not None and until not in STAGES:
        raise UserError(
            f"--until {until}: no such stage{did_you_mean(until, STAGES)}. The stages are {', '.join(STAGES)}."
        )
    if until is not None and until not in stages:
        raise UserError(f"--until {until}: nothing is learned there in this run. Use one of {', '.join(stages)}.")
    if not stages:
        raise UserError("stages: none of them trains, so that there is nothing to compare. Add one.")
    return until or stages[-1]


def measure(given: str | None, stages: Sequence[str]) -> Measure:
    """What `--metric [STAGE.]NAME[:min|max]` names, or the last stage's own figure.

    Args:
        stages: those that train in this sweep.
    Raises:
        UserError: another stage, or a figure of which nothing tells whether less or more is better.
    """
    if given is None:
        return Measure(stages[-1], *OWN[stages[-1]])
    name, _, mode = given.partition(":")
    stage, dot, rest = name.partition(".")
    if dot and stage in TRAINING_STAGES:
        name = rest
    else:
        stage = stages[-1]
    if stage not in stages:
        raise UserError(f"--metric {given}: this sweep has the training stages {', '.join(stages)} alone.")
    if not name or mode not in ("", "min", "max"):
        raise UserError(f"--metric {given}: write it as [STAGE.]NAME[:min|max], for example pretrain.validation_loss.")
    own, own_mode, title = OWN[stage]
    if name == own and mode in ("", own_mode):
        return Measure(stage, own, own_mode, title)
    found: Mode | None = "min" if mode == "min" else "max" if mode == "max" else _mode(name)
    if found is None:
        raise UserError(f"--metric {given}: is less or more of it better? Add :min or :max.")
    return Measure(stage, name, found, f"{stage}'s {name.replace('_', ' ')}")


def _mode(name: str) -> Mode | None:
    words = name.partition("/")[0]
    if words.endswith(_LESS):
        return "min"
    return "max" if words.endswith(_MORE) else None


def figure_of(measured: Measure, record: Record) -> float:
    """The figure of a finished stage.

    Raises:
        UserError: it has none of this name.
    """
    if measured.name not in record.metrics:
        hint = did_you_mean(measured.name, record.metrics)
        raise UserError(
            f"--metric {measured.text}: {measured.stage} has no such figure{hint}. It has "
            f"{', '.join(sorted(record.metrics))}."
        )
    return record.metrics[measured.name]

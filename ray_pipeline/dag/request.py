"""What is asked of a run: its settings, its layout, and which of its stages. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.launch.cluster import Cluster
from ray_pipeline.launch.stage_context import StageFunction
from ray_pipeline.layout.layout import Layout
from ray_pipeline.settings.schema import STAGES, PipelineFields


@dataclass(frozen=True)
class StageSelection:
    """`--stage` (one again), or `--from` and `--until` (a range).

    Attributes:
        among: the stages that this process may run; None: all. since: Unix seconds; a stage that finished after them is
            not run again by a flag, as it was run because of it.
    """

    only: str | None = None
    from_: str | None = None
    until: str | None = None
    among: tuple[str, ...] | None = None
    since: float | None = None

    def check(self) -> None:
        """Refuse names that do not exist and combinations that say nothing.

        Raises:
            UserError: with a suggestion.
        """
        for flag, name in (("--stage", self.only), ("--from", self.from_), ("--until", self.until)):
            if name is not None and name not in STAGES:
                known = ", ".join(STAGES)
                raise UserError(f"{flag} {name}: no such stage{did_you_mean(name, STAGES)}. The stages are {known}.")
        if self.only and (self.from_ or self.until):
            raise UserError(f"--stage {self.only} runs one stage and --from/--until a range: give one or the other.")
        if self.from_ and self.until and STAGES.index(self.from_) > STAGES.index(self.until):
            raise UserError(f"--from {self.from_} --until {self.until}: {self.from_} comes after {self.until}.")

    def check_chain(self, stages: tuple[str, ...]) -> None:
        """Refuse a stage that this run does not have.

        Raises:
            UserError: naming the key that adds it.
        """
        for flag, name in (("--stage", self.only), ("--from", self.from_), ("--until", self.until)):
            if name is not None and name not in stages:
                raise UserError(
                    f"{flag} {name}: this run has the stages {', '.join(stages)}. Add {name} to `stages` to have it."
                )

    def selects(self, stage: str) -> bool:
        """Whether the stage may run."""
        if self.among is not None and stage not in self.among:
            return False
        if self.only:
            return stage == self.only
        index = STAGES.index(stage)
        first = STAGES.index(self.from_) if self.from_ else 0
        last = STAGES.index(self.until) if self.until else len(STAGES) - 1
        return first <= index <= last

    def forces(self, stage: str, finished: float | None = None) -> str | None:
        """The flag by which the stage runs again though it is finished, as it was at `finished` (Unix seconds)."""
        if not self.selects(stage) or (self.since is not None and (finished or 0.0) >= self.since):
            return None
        return "--stage" if self.only else "--from" if self.from_ else None


@dataclass(frozen=True)
class RunRequest:
    """One call of `run` or `resume`, checked and ready to be executed, here or on Modal.

    Attributes:
        config: with `run_name`. layout: legal for it.
        resume: apply settings that changed since the run was started; else they are refused.
        cluster: what the Ray cluster has that is to run it; None for a machine alone.
        dry_run: print the plan alone. stage_functions: in place of the stages' own `run`, by name, for tests.
        detach, yes: of a run elsewhere: leave once it has begun; do not ask before it costs money.
        stored: settings (YAML) that are kept as the run's own in place of `config`, which fits one machine alone.
        shared_folder: whether all machines of a cluster have the run's folder.
    """

    config: PipelineFields
    layout: Layout
    stages: StageSelection = field(default_factory=StageSelection)
    resume: bool = False
    dry_run: bool = False
    cluster: Cluster | None = None
    stage_functions: Mapping[str, StageFunction] = field(default_factory=dict)
    detach: bool = False
    yes: bool = False
    stored: str | None = None
    shared_folder: bool = True

    @property
    def run_dir(self) -> Path:
        """The run's folder, absolute."""
        assert self.config.run_name is not None
        return (self.config.output_dir / self.config.run_name).absolute()

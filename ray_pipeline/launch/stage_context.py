"""What a stage is given and what it returns.

Stages never import Ray: they take a launcher, so a debugger can run one inline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ray_pipeline.records.input_files import InputGuard
from ray_pipeline.settings.schema import PipelineFields

RankFunction = Callable[[dict[str, Any]], dict[str, Any]]


class Launcher(Protocol):
    """Runs one function on every rank of a job."""

    def run(self, name: str, function: RankFunction, arguments: dict[str, Any]) -> dict[str, Any]:
        """Start the ranks with torch.distributed initialised, wait, and return rank 0's value.

        Raises:
            StageFailed: when the ranks ended in error more often than `layout.max_restarts`.
        """
        ...


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may look at.

    Attributes:
        run_dir: the run's folder. folder: this stage's own folder, `run_dir/<stage>-<identity>`.
        inputs: finished upstream stages, by name.
        wandb_id: stable id of this stage's W&B run.
        guard: tells whether the local files it reads are still those the run was accepted with.
    """

    config: PipelineFields
    run_name: str
    run_dir: Path
    folder: Path
    inputs: Mapping[str, StageResult]
    launcher: Launcher
    wandb_id: str = ""
    guard: InputGuard = field(default_factory=lambda: InputGuard({}))


@dataclass(frozen=True)
class StageResult:
    """What a finished stage leaves behind; kept in the ledger as JSON.

    Attributes:
        folder: where the outputs are.
        metrics: final figures, flat: {"validation_loss": 1.93}.
        baselines: what the figures are held against: {"ln_vocab": 6.24, "unigram_entropy": 4.9}.
        learned: None where there is nothing to learn; False means the stage did not beat its input.
    """

    folder: Path
    metrics: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    learned: bool | None = None


StageFunction = Callable[[StageContext], StageResult]

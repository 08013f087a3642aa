"""Finds runs by name. A run is a folder that holds config.yaml."""

from __future__ import annotations

import os
from pathlib import Path

from ray_pipeline.errors import UserError, did_you_mean

CONFIG_FILE = "config.yaml"


def output_dir(given: str | None) -> Path:
    """The folder of all runs: flag, environment, or the default."""
    from ray_pipeline.settings.layers import ENV_PREFIX
    from ray_pipeline.settings.schema import PipelineFields

    return Path(given or os.environ.get(f"{ENV_PREFIX}OUTPUT_DIR") or PipelineFields.model_fields["output_dir"].default)


def list_runs(folder: Path) -> list[Path]:
    """Run folders, the most recently changed first."""
    if not folder.is_dir():
        return []
    runs = [path.parent for path in folder.glob(f"*/{CONFIG_FILE}")]
    return sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)


def find_run(name: str, folder: Path) -> Path:
    """The folder of the run called `name`; a path to a run's folder works too.

    Raises:
        UserError: no such run, listing those there are.
    """
    for candidate in (folder / name, Path(name)):
        if name and (candidate / CONFIG_FILE).is_file():
            return candidate.absolute()
    known = [run.name for run in list_runs(folder)]
    if not known:
        raise UserError(f'run "{name}": there are no runs in {folder}. Start one with `run`, or give --output-dir.')
    shown = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
    raise UserError(f'run "{name}": not found in {folder}{did_you_mean(name, known)}. The runs there are {shown}.')


def latest_run(folder: Path) -> Path:
    """The run changed last.

    Raises:
        UserError: there is none.
    """
    runs = list_runs(folder)
    if not runs:
        raise UserError(f"there are no runs in {folder}. Start one with `run`, or give --output-dir.")
    return runs[0].absolute()

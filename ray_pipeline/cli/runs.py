"""Finds runs by name, and what their finished stages left behind. A run is a folder that holds config.yaml."""

from __future__ import annotations

import os
from pathlib import Path

from ray_pipeline.errors import UserError, command, did_you_mean, resume_command
from ray_pipeline.settings.run_folder import CONFIG_FILE


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
        raise UserError(f'run "{name}": {no_runs(folder)}')
    shown = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
    raise UserError(f'run "{name}": not found in {folder}{did_you_mean(name, known)}. The runs there are {shown}.')


def no_runs(folder: Path) -> str:
    """The end of a message where a run was meant and none is there."""
    return f"there are no runs in {folder}. Start one with `{command('run')}`, or give --output-dir."


def latest_run(folder: Path) -> Path:
    """The run changed last.

    Raises:
        UserError: there is none.
    """
    runs = list_runs(folder)
    if not runs:
        raise UserError(no_runs(folder))
    return runs[0].absolute()


def finished_stages(run_dir: Path) -> dict[str, Path]:
    """Folder of each finished stage that is there, in the order of the pipeline.

    Raises:
        UserError: the run's ledger cannot be read.
    """
    from ray_pipeline.dag.ledger import read_status

    stages = read_status(run_dir)["stages"]
    return {stage["stage"]: Path(stage["folder"]) for stage in stages if stage["status"] in ("done", "learned_nothing")}


def choose_stage(run_dir: Path, wanted: str | None, candidates: tuple[str, ...]) -> tuple[str, Path]:
    """Name and folder of the wanted stage, or of the last finished one among the candidates.

    Raises:
        UserError: not a stage that serves, or not finished yet.
    """
    if wanted is not None and wanted not in candidates:
        raise UserError(f"--stage {wanted}: not one of {', '.join(candidates)}{did_you_mean(wanted, candidates)}.")
    folders = {name: path for name, path in finished_stages(run_dir).items() if name in candidates}
    way_out = f"Go on with `{resume_command(run_dir)}`."
    if wanted is not None and wanted not in folders:
        done = f"finished are {', '.join(folders)}" if folders else "none is finished"
        raise UserError(f"--stage {wanted}: run {run_dir.name} has not finished it ({done}). {way_out}")
    if not folders:
        raise UserError(f"run {run_dir.name}: {' or '.join(candidates)} has to be finished first. {way_out}")
    name = wanted or list(folders)[-1]
    return name, folders[name]

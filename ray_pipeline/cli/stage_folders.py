"""Finds what the finished stages of a run left behind."""

from __future__ import annotations

from pathlib import Path

from ray_pipeline.errors import UserError, did_you_mean


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
    if wanted is not None and wanted not in folders:
        done = f"finished are {', '.join(folders)}" if folders else "none is finished"
        raise UserError(f"--stage {wanted}: run {run_dir.name} has not finished it ({done}). Go on with `resume`.")
    if not folders:
        raise UserError(f"run {run_dir.name}: {' or '.join(candidates)} has to be finished first. Go on with `resume`.")
    name = wanted or list(folders)[-1]
    return name, folders[name]

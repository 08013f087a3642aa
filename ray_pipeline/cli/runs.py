"""Finds runs by name, and what their finished stages left behind. A run is a folder that holds config.yaml.

A folder of runs may be in a bucket, under an address such as s3://BUCKET/runs: each run is worked on, and read, in a
copy in the user's cache, whose folder remembers the address.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_pipeline.errors import UserError, command, did_you_mean, resume_command
from ray_pipeline.settings.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from ray_pipeline.records.buckets.kept_run import KeptRun

ADDRESS_FILE = ".address"  # in a folder of copies: where its runs are kept


def output_dir(given: str | None) -> Path:
    """The folder of all runs: flag, environment, or the default; of runs in a bucket the folder of their copies."""
    from ray_pipeline.settings.layers import ENV_PREFIX
    from ray_pipeline.settings.schema import PipelineFields

    default = PipelineFields.model_fields["output_dir"].default
    return folder_here(given or os.environ.get(f"{ENV_PREFIX}OUTPUT_DIR") or default)


def folder_here(place: str | Path) -> Path:
    """A folder as it is, or where the runs under an address have their copies.

    Raises:
        UserError: an address of no known kind.
    """
    if isinstance(place, Path):  # of a recipe, where a path has made one slash of two
        place = re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", str(place))
    if "://" not in place:
        return Path(place)
    from ray_pipeline.records.artifacts import write_text
    from ray_pipeline.records.buckets.bucket import Bucket
    from ray_pipeline.serving.environments import cache_folder

    address = Bucket(place).address
    folder = cache_folder() / "runs" / hashlib.sha256(address.encode()).hexdigest()[:12]
    if not (folder / ADDRESS_FILE).is_file():
        write_text(folder / ADDRESS_FILE, address)
    return folder


def kept_run(run_dir: Path) -> KeptRun | None:
    """The run in its bucket; None where it is kept here alone."""
    note = run_dir.parent / ADDRESS_FILE
    if not note.is_file():
        return None
    from ray_pipeline.records.buckets.kept_run import KeptRun

    return KeptRun(note.read_text(encoding="utf-8").strip(), run_dir)


def bring(run_dir: Path) -> None:
    """Make the copy of a run like its bucket's, unless a process of this machine works on it."""
    from ray_pipeline.dag.ledger import lock_holder

    kept = kept_run(run_dir)
    if kept is None or lock_holder(run_dir) is not None:
        return
    if kept.bring(checkpoints=False) or (run_dir / CONFIG_FILE).is_file():
        click.echo(f"{kept.bucket.address}: read in {run_dir}; what is written there goes up with `resume`", err=True)


def bring_named(name: str, folder: Path) -> None:
    """The same of a run by its name; a path is read as it is."""
    if name and "/" not in name:
        bring(folder / name)


@contextmanager
def kept_alike(run_dir: Path) -> Iterator[None]:
    """While a run is worked on: its bucket gets what is written, and nobody else works on it there."""
    run = kept_run(run_dir)
    if run is None:
        yield
        return
    from ray_pipeline.records.buckets.lease import kept

    with kept(run):
        yield
    click.echo(f"Kept in {run.bucket.address}")


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
    bring_named(name, folder)
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
        UserError: there is none, or they are in a bucket, of which the copies here need not be all.
    """
    if (note := folder / ADDRESS_FILE).is_file():
        raise UserError(f"{note.read_text(encoding='utf-8')}: name the RUN; those of a bucket are brought one by one.")
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

"""Files to and from the volume: local inputs go up under their content's hash, a run's outputs come down."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO, Protocol

from ray_pipeline.dag.identity import local_path, source_names
from ray_pipeline.dag.ledger import RunFile, refuse_foreign_run
from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import atomic_path
from ray_pipeline.records.input_files import Digests
from ray_pipeline.settings.run_folder import CHECKPOINTS, RUN_FILE
from ray_pipeline.settings.schema import PipelineFields

INPUTS = "inputs"
# Only a resume on Modal needs checkpoints, and it finds them on the volume.
SKIPPED = (CHECKPOINTS,)


class VolumeFiles(Protocol):
    """What `fetch` needs of a volume."""

    def files(self, folder: str) -> list[tuple[str, int, int]]:
        """(path, bytes, Unix seconds of the last change) of every file below `folder`."""
        ...

    def read(self, path: str, into: IO[bytes]) -> None:
        """Download one file."""
        ...


def local_inputs(config: PipelineFields) -> dict[str, Path]:
    """Sources that are files or folders on this machine: name as written in the settings -> path."""
    paths = {name: local_path(name) for name in source_names(config).values()}
    return {name: path for name, path in paths.items() if path is not None}


def remote_name(path: Path) -> str:
    """Place of an input on the volume: a hash of its content, so that it goes up once, then its name."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(bytes.fromhex(Digests().sha256(file)))
    return f"{INPUTS}/{digest.hexdigest()[:16]}/{path.name}"


def refuse_other_run(volume: VolumeFiles, run_name: str, run_dir: Path) -> None:
    """Refuse to copy a run's files over those of another one that has its name.

    Raises:
        UserError: with where the outputs are.
    """
    refuse_foreign_run(run_dir)
    names = [path for path, _, _ in volume.files(f"/{run_name}") if Path(path).name == RUN_FILE]
    if not names or not (run_dir / RUN_FILE).exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, RUN_FILE).open("wb") as file:
            volume.read(names[0], file)
        if RunFile(Path(folder)).uid != RunFile(run_dir).uid:
            raise UserError(
                f"{run_dir}: holds another run of this name, which is not replaced. The outputs are on Modal's volume; "
                "run the same command with another --output-dir to fetch them."
            )


def fetch(volume: VolumeFiles, run_name: str, output_dir: Path) -> tuple[int, int]:
    """Copy a run's files to `output_dir/run_name`, each written aside and renamed. A file that is here with the same
    size and time is kept.

    Returns:
        (files copied, bytes copied).
    Raises:
        UserError: another run of this name, or a folder that is none, is there.
    """
    files = size = 0
    refuse_other_run(volume, run_name, output_dir / run_name)
    # run.json first: a fetch that is cut short leaves a folder that is known as this run's.
    entries = sorted(volume.files(f"/{run_name}"), key=lambda entry: Path(entry[0]).name != RUN_FILE)
    for path, length, changed in entries:
        relative = Path(path.lstrip("/")).relative_to(run_name)
        if any(part in SKIPPED for part in relative.parts):
            continue
        target = output_dir / run_name / relative
        if target.is_file() and (os.path.getsize(target), int(os.path.getmtime(target))) == (length, changed):
            continue
        with atomic_path(target, durable=False) as aside:
            with aside.open("wb") as file:
                volume.read(path, file)
            os.utime(aside, (changed, changed))
        files, size = files + 1, size + length
    return files, size

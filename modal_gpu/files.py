"""Files to and from the volume: inputs go up under their content's hash, what a run needs goes along, outputs come down
and are held against the sums that the container wrote."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import modal

from modal_gpu.volume_sync import SUMS, read_sums
from ray_pipeline.dag.identity import local_path, moved_name, source_names, with_source_names
from ray_pipeline.dag.ledger import Record, RunFile, read_record, refuse_foreign_run
from ray_pipeline.errors import UserError, command
from ray_pipeline.records.artifacts import atomic_path
from ray_pipeline.records.input_files import Digests
from ray_pipeline.records.integrity import file_sha256
from ray_pipeline.settings.run_folder import CHECKPOINTS, MODAL_FILE, RECORD, RUN_FILE, newest_checkpoint
from ray_pipeline.settings.schema import PipelineFields

INPUTS = "inputs"
NOT_FETCHED = (MODAL_FILE, SUMS, ".lock")
TRIES = 2


class VolumeFiles(Protocol):
    """What `fetch` needs of a volume."""

    def files(self, folder: str) -> list[tuple[str, int, int]]:
        """(path, bytes, Unix seconds of the last change) of every file below `folder`."""
        ...

    def read(self, path: str, into: IO[bytes]) -> None:
        """Download one file."""
        ...


class VolumeCopy:
    """A Modal volume as `fetch` sees it."""

    def __init__(self, volume: Any):
        self.volume = volume

    def files(self, folder: str) -> list[tuple[str, int, int]]:
        """Empty where the folder is not there."""
        try:
            entries = self.volume.listdir(folder, recursive=True)
        except (FileNotFoundError, modal.exception.NotFoundError):
            return []
        return [(entry.path.lstrip("/"), entry.size, entry.mtime) for entry in entries if entry.type.name == "FILE"]

    def read(self, path: str, into: IO[bytes]) -> None:
        """Download one file."""
        self.volume.read_file_into_fileobj(path, into)


class VolumeRun:
    """One run's files on a volume, as `records.mirror` reads them."""

    def __init__(self, copy: VolumeFiles, run: str):
        self.copy, self.run = copy, run

    def files(self) -> dict[str, tuple[int, object]]:
        """Bytes and Unix seconds of the last change by path below the run."""
        found = self.copy.files(f"/{self.run}")
        return {path.removeprefix(f"{self.run}/"): (size, changed) for path, size, changed in found}

    def read(self, name: str, start: int) -> bytes:
        """A volume gives files whole."""
        return (read_small(self.copy, f"{self.run}/{name}") or b"")[start:]


@dataclass(frozen=True)
class Fetched:
    """What was copied; checked: files that were held against their SHA-256."""

    files: int
    size: int
    checked: int

    def describe(self, run_dir: Path) -> str:
        """`Fetched 12 files (3.1 MiB, 10 of them checked) into runs/x`."""
        return (
            f"Fetched {self.files} files ({self.size / 2**20:.1f} MiB, {self.checked} of them checked) into {run_dir}"
        )


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


def upload(config: PipelineFields, volume: Any, mounted: str) -> PipelineFields:
    """Send local input files to the volume; returns the settings for containers, which see it at `mounted`."""
    inputs = local_inputs(config)
    places = {path: remote_name(path) for path in inputs.values()}
    if places:
        there = {path for path, _, _ in VolumeCopy(volume).files(f"/{INPUTS}")}
        missing = {p: place for p, place in places.items() if not _is_there(p, place, there)}
        if missing:
            with volume.batch_upload(force=True) as batch:
                for path, place in missing.items():
                    put = batch.put_directory if path.is_dir() else batch.put_file
                    put(path, place)
        for path, place in places.items():
            if remote_name(path) != place:  # its place is named by what it held before
                raise UserError(f"{path}: changed while it was uploaded. Run the same command again.")
    # The name may go on after the path: data.parquet:column
    names = {name: moved_name(name, path, f"{mounted}/{places[path]}") for name, path in inputs.items()}
    return with_source_names(config, names)


def _is_there(path: Path, place: str, there: set[str]) -> bool:
    if path.is_file():
        return place in there
    return all(f"{place}/{file.relative_to(path).as_posix()}" in there for file in path.rglob("*") if file.is_file())


def refuse_other_run(volume: VolumeFiles, run_dir: Path, *, going_up: bool = False) -> None:
    """Refuse to mix a run's files with those of another one that has its name.

    Raises:
        UserError: with where the outputs are.
    """
    refuse_foreign_run(run_dir)
    uid, here = _uid_there(volume, run_dir.name), (run_dir / RUN_FILE).exists()
    if uid is None or (here and RunFile(run_dir).uid == uid) or not (here or going_up):
        return
    if not here:
        pull = command("modal", "pull", run_dir.name, "--output-dir", run_dir.parent)
        raise UserError(
            f"run {run_dir.name}: is on Modal's volume already, and not in {run_dir.parent}. Fetch it with `{pull}` "
            "and resume it, or give this run another --run-name."
        )
    raise UserError(
        f"{run_dir}: holds another run of this name, which is not replaced. The outputs are on Modal's volume; "
        "fetch them with another --output-dir, or give this run another --run-name."
    )


def _uid_there(volume: VolumeFiles, run: str) -> str | None:
    found = read_small(volume, f"{run}/{RUN_FILE}")
    if found is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, RUN_FILE).write_bytes(found)
        return RunFile(Path(folder)).uid


def read_small(volume: VolumeFiles, path: str) -> bytes | None:
    """A file's bytes; None where it is not there."""
    with tempfile.TemporaryFile() as file:
        try:
            volume.read(path, file)
        except FileNotFoundError:
            return None
        file.seek(0)
        return file.read()


def send_run(copy: VolumeFiles, volume: Any, run_dir: Path) -> int:
    """Send the run's ledger, and what is needed to go on of stages that went further here; the number of files."""
    there = {path for path, _, _ in copy.files(f"/{run_dir.name}")}
    files = [run_dir / RUN_FILE]
    for folder in sorted({path.parent for path in run_dir.glob(f"*-*/{RECORD}")}):
        record = read_record(folder)
        theirs = _record_there(copy, f"{run_dir.name}/{folder.name}/{RECORD}", there)
        if record is None or (theirs is not None and (theirs.is_finished or not record.is_finished)):
            continue
        newest = None if record.is_finished else newest_checkpoint(folder)
        files += [path for path in sorted(folder.rglob("*")) if path.is_file() and _goes(path, folder, newest)]
    with volume.batch_upload(force=True) as batch:
        for path in files:
            batch.put_file(path, f"{run_dir.name}/{path.relative_to(run_dir).as_posix()}")
    return len(files)


def _record_there(copy: VolumeFiles, path: str, there: set[str]) -> Record | None:
    if path not in there:
        return None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, RECORD).write_bytes(read_small(copy, path) or b"")
        return read_record(Path(folder))


def _goes(path: Path, folder: Path, newest: int | None) -> bool:
    parts = path.relative_to(folder).parts
    if parts[0] != CHECKPOINTS:
        return True
    return newest is not None and len(parts) > 2 and parts[1] == f"step_{newest:08d}"


def fetch(
    volume: VolumeFiles, run: str, output_dir: Path, *, checkpoints: bool = False,
    only: Callable[[str], bool] | None = None,
) -> Fetched:  # fmt: skip
    """Copy a run's files to `output_dir/run`, each written aside, checked and renamed. What is here already is kept.

    Args:
        checkpoints: the newest of each unfinished stage too, with which a run goes on here.
        only: of the paths below the run.
    Raises:
        UserError: another run of this name, or a folder that is none, is there; a file that arrives damaged.
    """
    run_dir = output_dir / run
    refuse_other_run(volume, run_dir)
    sums = read_sums(read_small(volume, f"{run}/{SUMS}") or b"")
    entries = [(path, path.removeprefix(f"{run}/"), size, at) for path, size, at in volume.files(f"/{run}")]
    wanted = list(_wanted(entries, checkpoints=checkpoints))
    files = size = checked = 0
    # run.json first: a fetch that is cut short leaves a folder that is known as this run's.
    for path, name, length, changed in sorted(wanted, key=lambda entry: entry[1] != RUN_FILE):
        if only is not None and not only(name):
            continue
        target = run_dir / name
        if _is_same(target, length, changed, sums.get(name)):
            continue
        checked += _copy(volume, path, target, changed, sums.get(name))
        files, size = files + 1, size + length
    return Fetched(files, size, checked)


def _wanted(entries: list[tuple[str, str, int, int]], *, checkpoints: bool) -> Iterator[tuple[str, str, int, int]]:
    newest: dict[str, str] = {}
    for _, name, _, _ in entries:
        parts = name.split("/")
        if CHECKPOINTS in parts and len(parts) > 3 and parts[2].startswith("step_"):
            newest[parts[0]] = max(newest.get(parts[0], ""), parts[2])
    finished = {
        name.split("/")[0] for _, name, _, _ in entries if name.count("/") > 1 and name.split("/")[1] == "model"
    }
    for entry in entries:
        parts = entry[1].split("/")
        if parts[-1] in NOT_FETCHED or any(part.startswith(".") for part in parts[:-1]):
            continue
        if CHECKPOINTS in parts:
            if not checkpoints or parts[0] in finished or newest.get(parts[0]) not in parts:
                continue
        yield entry


def _is_same(target: Path, length: int, changed: int, known: tuple[int, str] | None) -> bool:
    if not target.is_file() or os.path.getsize(target) != length:
        return False
    if int(os.path.getmtime(target)) == changed:
        return True
    return known is not None and known[0] == length and file_sha256(target) == known[1]


def _copy(volume: VolumeFiles, path: str, target: Path, changed: int, known: tuple[int, str] | None) -> bool:
    """Whether it was checked: the file is still the one that its sum is of.

    Raises:
        UserError: it does not arrive as it was written; what was here stays.
    """
    for _ in range(TRIES):
        with suppress(_Damaged), atomic_path(target, durable=False) as aside:
            with aside.open("wb") as file:
                volume.read(path, file)
            checked = known is not None and os.path.getsize(aside) == known[0]
            if known is not None and checked and file_sha256(aside) != known[1]:
                raise _Damaged
            os.utime(aside, (changed, changed))
            return checked
    raise UserError(f"{path}: arrived with other contents than were written, {TRIES} times. Fetch again later.")


class _Damaged(Exception):
    """A file that is not what its sum is of."""

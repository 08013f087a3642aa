"""A run in a bucket and its copy on this machine, which is what is worked on.

What lies in the bucket can be gone on with whenever this machine ends: of a checkpoint the manifest goes up last, of a
stage its record, and what is deleted here is deleted there after everything new has arrived.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import atomic_path, write_sealed
from ray_pipeline.records.buckets.bucket import Bucket, Facts
from ray_pipeline.records.integrity import file_sha256, read_sealed
from ray_pipeline.settings.run_folder import (
    CHECKPOINTS,
    LOCK,
    MANIFEST,
    MODEL,
    RECORD,
    RUN_FILE,
    STOP_FILE,
)

STATE = ".bucket.json"  # beside the copy's files: how each of them was, here and there, when both were alike
LEASE = ".lease.json"  # in the bucket: who works on the run
STAYS = (LOCK, STATE, LEASE, STOP_FILE)
BEST = "best.json"  # names a checkpoint
RAYS_OWN = "ray"  # a folder of a stage that Ray Train works in
SAID_LAST = (RECORD, RUN_FILE)  # what vouches for other files
Mark = tuple[int, int]  # of a file here: bytes, nanoseconds of its last change


class KeptRun:
    """One run.

    Args:
        runs: address of the folder of runs. copy: the run's folder here.
    """

    def __init__(self, runs: str, copy: Path):
        self.bucket, self.copy = Bucket(f"{runs.rstrip('/')}/{copy.name}"), copy
        self._id = secrets.token_hex(8)
        self._there: dict[str, Facts] = {}
        self._here: dict[str, Mark] = {}

    @property
    def copy_id(self) -> str:
        """Of this copy among all, for as long as it lies here."""
        self._load()
        return self._id

    def bring(self, *, checkpoints: bool, newest_here: bool = False) -> int:
        """Copy what is there and not here; returns the number of files.

        Args:
            checkpoints: those of unfinished stages too, to go on with.
            newest_here: this copy was the last that was worked on, and was killed: what differs is newer here.
        Raises:
            UserError: the bucket cannot be read; or the copy has changes that never arrived there, and the bucket has
                changed as well.
        """
        self._load()
        with self.bucket.explained():
            there = self.bucket.everything()
            wanted = {name: facts for name, facts in there.items() if _goes_down(name, there, checkpoints=checkpoints)}
            changed = [name for name, facts in wanted.items() if self._there.get(name) != facts]
            both = [name for name in changed if self._is_own(name)]
            if newest_here:
                changed, both = [name for name in changed if name not in both], []
            if both := [name for name in both if not self._is_alike(name)]:
                raise UserError(
                    f"{self.copy}: {len(both)} files ({both[0]} ...) have changes that never arrived in "
                    f"{self.bucket.address}, which has gone on from another machine since. Move the folder away to go "
                    "on from the bucket."
                )
            for name in sorted(changed, key=_rank):
                with atomic_path(self.copy / name, durable=False) as aside:
                    self.bucket.get(name, aside)
                self._there[name], self._here[name] = there[name], _mark(self.copy / name)
            for name in [name for name in self._there if name not in there]:
                if not self._is_own(name):
                    (self.copy / name).unlink(missing_ok=True)
                del self._there[name], self._here[name]
        if there or self.copy.is_dir():
            self._save()
        return len(changed)

    def push(self) -> int:
        """Send what has changed here; returns the number of files.

        Raises:
            UserError: the bucket does not take it. What is there is whole, if older.
        """
        self._load()
        # As they are now: what a record vouches for was written before it, and is found by the walk below.
        vouching = {name: (_mark(self.copy / name), (self.copy / name).read_bytes()) for name in self._vouching()}
        here = {name: _mark(self.copy / name) for name in self._walk()}
        here |= {name: mark for name, (mark, _) in vouching.items()}
        changed = sorted((name for name, mark in here.items() if self._here.get(name) != mark), key=_rank)
        sent: dict[str, Mark] = {}
        with self.bucket.explained():
            for name in changed:
                path = self.copy / name
                if name in vouching:
                    self.bucket.write(name, vouching[name][1])
                elif path.name in SAID_LAST or (path.name == MANIFEST and not _is_whole(path)):
                    continue  # it came, or went, meanwhile: next time
                else:
                    try:
                        self.bucket.put(path, name)
                    except FileNotFoundError:  # deleted here meanwhile
                        continue
                sent[name] = here[name]
            gone = [name for name in self._here if name not in here]
            self.bucket.delete(sorted(gone, key=_rank, reverse=True))
            if sent or gone:
                there = self.bucket.everything()
                self._there.update({name: there[name] for name in sent if name in there})
        self._here.update(sent)
        for name in gone:
            self._here.pop(name), self._there.pop(name, None)
        self._save()
        return len(sent)

    def _is_own(self, name: str) -> bool:
        """Whether the file here is not as it was when both were alike."""
        path = self.copy / name
        return path.exists() and self._here.get(name) != _mark(path)

    def _is_alike(self, name: str) -> bool:
        """Whether it has the same contents there: it was on its way when a process was killed."""
        with tempfile.TemporaryDirectory() as folder:
            self.bucket.get(name, Path(folder, "there"))
            return file_sha256(Path(folder, "there")) == file_sha256(self.copy / name)

    def _vouching(self) -> list[str]:
        found = [path for pattern in (RUN_FILE, f"*/{RECORD}") for path in self.copy.glob(pattern)]
        return [path.relative_to(self.copy).as_posix() for path in found]

    def _walk(self) -> Iterator[str]:
        for path in self.copy.rglob("*"):
            name = path.relative_to(self.copy).as_posix()
            if not _stays(name) and path.is_file():
                yield name

    def _load(self) -> None:
        """What is known of both, by whichever process last brought or pushed."""
        path = self.copy / STATE
        new: dict[str, Any] = {"id": self._id, "there": {}, "here": {}}
        stored = read_sealed(path, f"Move {self.copy} away to go on from the bucket.") if path.exists() else new
        self._id = stored["id"]
        self._there = {name: (size, version) for name, (size, version) in stored["there"].items()}
        self._here = {name: (size, at) for name, (size, at) in stored["here"].items()}

    def _save(self) -> None:
        write_sealed(self.copy / STATE, {"id": self._id, "there": self._there, "here": self._here}, durable=False)


def _stays(name: str) -> bool:
    """Whether it is only of this machine, or half written."""
    *folders, last = name.split("/")
    half = last.startswith(".") and last.endswith(".partial")
    return half or last in STAYS or folders[1:2] == [RAYS_OWN] or any(folder.startswith(".") for folder in folders)


def _mark(path: Path) -> Mark:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _rank(name: str) -> tuple[int, str]:
    """Order of sending: what vouches for other files goes after them."""
    order = (MANIFEST, BEST, *SAID_LAST)
    last = name.rpartition("/")[2]
    return (order.index(last) + 1 if last in order else 0), name


def _is_whole(manifest: Path) -> bool:
    """Whether all that it lists is still beside it."""
    try:
        listed = json.loads(manifest.read_bytes()).get("files", {})
    except (OSError, ValueError):
        return False
    return all((manifest.parent / name).exists() for name in listed)


def _goes_down(name: str, there: dict[str, Facts], *, checkpoints: bool) -> bool:
    parts = name.split("/")
    if _stays(name):
        return False
    if CHECKPOINTS not in parts:
        return True
    stage = parts[0]
    finished = any(other.startswith(f"{stage}/{MODEL}/") for other in there)
    if not checkpoints or finished:
        return False
    return len(parts) < 4 or f"{stage}/{CHECKPOINTS}/{parts[2]}/{MANIFEST}" in there

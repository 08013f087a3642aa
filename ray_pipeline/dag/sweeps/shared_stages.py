"""Stages that several trials of a sweep have in common: made once, by one of them, and had by all.

Equal identities mean equal results (`ray_pipeline.dag.identity`). A finished stage's folder is given to another run as
hard links: both runs are whole, and either can be deleted. What is written anew later gets a new file, so neither run
changes the other's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_pipeline.dag.ledger import read_record
from ray_pipeline.launch.rank_errors import WORKERS_LOCK
from ray_pipeline.records.artifacts import write_sealed, writing
from ray_pipeline.records.integrity import unsealed

LOCKS = ".shared"  # in the sweep's folder
POLL = 0.2  # seconds between two looks at a lock that another trial holds


@contextmanager
def alone(sweep_dir: Path, name: str) -> Iterator[Path]:
    """Let one trial at a time work on what `name` names; the kernel lets go when its process ends, however it ends.

    Gives a path for what is to be told to the next one.
    """
    folder = sweep_dir / LOCKS
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{name}.lock").open("a")
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL)
        yield folder / f"{name}.json"


def take_over(folder: Path, sweep_dir: Path) -> str | None:
    """Look for the stage of `folder` in the sweep's other runs, while nobody else works on it.

    A finished one is linked here. One that was begun and left, by a sweep that was killed, is moved here, so that its
    checkpoints are gone on from.

    Returns:
        The run it was found in; None where nothing was to be had.
    """
    others = [path for path in sorted(sweep_dir.glob(f"*/{folder.name}")) if path.parent != folder.parent]
    records = [(path, record) for path in others if (record := read_record(path)) is not None]
    finished = next((path for path, record in records if record.is_finished), None)
    if finished is not None:
        _link(finished, folder)
        return finished.parent.name
    if records and not folder.exists():
        path = records[0][0]
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            path.rename(folder)
        return path.parent.name
    return None


def _link(source: Path, folder: Path) -> None:
    """The same files at another place, whole or not at all; an unfinished attempt there makes room."""
    aside = folder.with_name(f".{folder.name}.linked")
    with writing(folder):
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source, aside, copy_function=_link_file, ignore=shutil.ignore_patterns(WORKERS_LOCK))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def tell_failure(path: Path, invocation: str, run: str, reason: str) -> None:
    """Leave word that the stage failed, for trials of the same call of `sweep`."""
    write_sealed(path, {"invocation": invocation, "run": run, "reason": reason}, durable=False)


def told_failure(path: Path, invocation: str) -> str | None:
    """Why the stage failed in another trial of this call; None where it did not."""
    try:
        told = unsealed(path.read_bytes())
    except (OSError, ValueError):
        return None
    return f"as in {told['run']}: {told['reason']}" if told["invocation"] == invocation else None

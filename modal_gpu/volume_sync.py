"""In a container: what is written to the volume is made to last, with sums by which a copy elsewhere is checked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import file_sha256, unsealed
from ray_pipeline.records.progress import ask_to_stop
from ray_pipeline.settings.run_folder import CHECKPOINTS, PROGRESS_FILE

SUMS = "modal-sums.json"  # of a run's files on the volume: size and SHA-256
EVERY_SECONDS, LOOK_SECONDS, ASK_SECONDS = 60.0, 1.0, 4.0
Sums = dict[str, tuple[int, str]]


def read_sums(text: bytes) -> Sums:
    """Path below the run's folder -> (bytes, SHA-256); empty where the file is damaged."""
    try:
        return {path: (int(size), str(digest)) for path, (size, digest) in unsealed(text)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_sums(run_dir: Path) -> None:
    """Sums of all files but checkpoints, which have a manifest of their own, and what changes while a stage works."""
    known: dict[str, Any] = {}
    if (run_dir / SUMS).exists():
        try:
            known = json.loads((run_dir / SUMS).read_text(encoding="utf-8")).get("seen", {})
        except (OSError, ValueError, AttributeError):
            known = {}
    files, seen = {}, {}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir).as_posix()
        if not path.is_file() or CHECKPOINTS in path.parts or path.name.startswith(".") or name == SUMS:
            continue
        if path.name == PROGRESS_FILE:
            continue
        found = path.stat()
        mark = [found.st_size, found.st_mtime_ns]
        before = known.get(name)
        digest = before[2] if before and before[:2] == mark else file_sha256(path)
        files[name], seen[name] = [found.st_size, digest], [*mark, digest]
    write_sealed(run_dir / SUMS, {"files": files, "seen": seen})


def checkpoints_in(run_dir: Path) -> frozenset[str]:
    """`sft-123/checkpoints/step_100`, of all stages."""
    return frozenset(
        path.relative_to(run_dir).as_posix() for path in run_dir.glob(f"*/{CHECKPOINTS}/step_*") if path.is_dir()
    )


@contextmanager
def lasting(
    run_dir: Path, commit: Callable[[], None], told: Callable[[str], None], stop_wanted: Callable[[], bool]
) -> Iterator[None]:
    """Commit after each checkpoint, now and then, and at the end; pass on a wish that the run save and end.

    Args:
        told: called with the newest checkpoint once it lasts. stop_wanted: asked every few seconds.
    """
    done = threading.Event()

    def repeat() -> None:
        known, waited, asked = checkpoints_in(run_dir), 0.0, 0.0
        while not done.wait(LOOK_SECONDS):
            waited, asked = waited + LOOK_SECONDS, asked + LOOK_SECONDS
            if asked >= ASK_SECONDS:
                asked = 0.0
                if stop_wanted():
                    ask_to_stop(run_dir, "it was asked to (modal stop)")
            now = checkpoints_in(run_dir)
            new = sorted(now - known)
            if new or waited >= EVERY_SECONDS:
                commit()
                known, waited = now, 0.0
                if new:
                    told(new[-1])

    thread = threading.Thread(target=repeat, name="volume", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if run_dir.is_dir():
            write_sums(run_dir)
        commit()

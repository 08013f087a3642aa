"""What a stage's processes print, in files of its folder: Ray keeps it from the terminal, in logs nobody finds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_pipeline.settings.run_folder import LOGS

_STREAMS = (1, 2)  # file descriptors of stdout and stderr


def output_file(folder: Path, name: str) -> Path:
    """Where a process of the stage prints to: `rank-0`, or `stage` for the stage's own."""
    return folder / LOGS / f"{name}.log"


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send what this process prints to the end of a file, libraries' output too, and give it back afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    saved = [os.dup(stream) for stream in _STREAMS]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in _STREAMS:
        os.dup2(file, stream)
    os.close(file)
    try:
        yield
    finally:
        _flush()
        for stream, before in zip(_STREAMS, saved, strict=True):
            os.dup2(before, stream)
            os.close(before)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or a stand-in of a test's
            stream.flush()


def printed(folder: Path) -> list[Path]:
    """The files that something was printed to, in the order of their names."""
    return sorted(path for path in (folder / LOGS).glob("*.log") if path.stat().st_size)

"""Figures of one stage over its steps, in metrics.jsonl of its folder: rank 0 writes, everybody else reads.

What trackers are sent is read from this file, so nothing that they do can reach training. Samples are read here too.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import atomic_path
from ray_pipeline.records.integrity import unsealed
from ray_pipeline.records.progress import read_progress
from ray_pipeline.settings.run_folder import METRICS_FILE, PROGRESS_FILE, SAMPLES_FILE

LOG = logging.getLogger(__name__)
CHECK = "crc32"  # key of a line's own checksum
NOT_FIGURES = ("stage", "step", "time")
VALIDATION = "val/"
_ONCE = {"tokens_per_second": "perf/tokens_per_second"}  # names of older versions, beside eval/ for val/
_MOST_BYTES = 1 << 20  # read at a time


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The stage's logged lines, oldest first, without those that are damaged or were torn by a kill."""
    return _scan_metrics(folder)[0]


def _scan_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The whole lines, and the numbers of damaged ones. A last line that does not end was torn: none of the two."""
    path = folder / METRICS_FILE
    if not path.exists():
        return [], []
    lines, damaged = [], []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        line = _whole_line(text)
        if line is None:
            damaged.append(number)
        else:
            lines.append(line)
    return lines, damaged


def _line_text(line: Mapping[str, Any]) -> str:
    """A line of the file, with its own checksum behind the figures."""
    return json.dumps({**line, CHECK: zlib.crc32(json.dumps(line).encode())}) + "\n"


def _whole_line(text: bytes) -> dict[str, Any] | None:
    """The figures of a line; None where it is not as it was written. Lines of older versions have no checksum."""
    try:
        line = json.loads(text.decode("utf-8"))
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    check = line.pop(CHECK, None)
    if check not in (None, zlib.crc32(json.dumps(line).encode())):
        return None
    return {_present_name(name): value for name, value in line.items()}


def _present_name(name: str) -> str:
    return VALIDATION + name.removeprefix("eval/") if name.startswith("eval/") else _ONCE.get(name, name)


def is_validation(figures: Mapping[str, Any]) -> bool:
    """Whether these are of an evaluation; those of training steps are on lines of their own."""
    return any(name.startswith(VALIDATION) for name in figures)


def read_samples(folder: Path) -> list[Any]:
    """Questions and the model's answers, as the stage left them.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / SAMPLES_FILE
    if not path.exists():
        return []
    text = path.read_bytes()
    if text.lstrip().startswith(b"["):  # of an older version
        return list(json.loads(text.decode("utf-8")))
    found = unsealed(text).get("samples")
    if not isinstance(found, list):
        raise ValueError("it lists no samples")
    return found


def damaged_files(folder: Path) -> list[str]:
    """What is damaged of the files a stage wrote for people to read: nothing is trained on them."""
    out = []
    if numbers := _scan_metrics(folder)[1]:
        shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
        out.append(f"{folder / METRICS_FILE}: damaged in line {shown}, left out")
    try:
        read_samples(folder)
    except ValueError as error:
        out.append(f"{folder / SAMPLES_FILE}: damaged ({error}), not shown")
    progress = folder / PROGRESS_FILE
    if progress.exists() and read_progress(folder) is None:
        out.append(f"{progress}: damaged, not shown")
    return out


class MetricsFile:
    """Writes `folder/metrics.jsonl`. A file that cannot be written is told once, and never stops training.

    On resume the lines past `resume_step` are dropped, because those steps are taken again.

    Args:
        evaluated: whether what was logged of the evaluation at `resume_step` stays; else it is taken again.
    Raises:
        UserError: on resume, a line of the file is damaged.
    """

    def __init__(self, folder: Path, stage: str, *, resume_step: int = 0, evaluated: bool = True):
        self.path, self.stage, self._lost = folder / METRICS_FILE, stage, 0
        lines, damaged = _scan_metrics(folder)
        if damaged and resume_step:
            raise UserError(
                f"{self.path}: damaged in line {damaged[0]}. Delete that line (sed -i {damaged[0]}d {self.path}) "
                "and resume: its figures are gone, training goes on as before."
            )
        kept = [line for line in lines if line["step"] <= resume_step]
        kept = [line for line in kept if evaluated or line["step"] < resume_step or not is_validation(line)]
        with atomic_path(self.path) as aside:
            aside.write_text("".join(map(_line_text, kept)), encoding="utf-8")
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Figures at `step` (optimizer steps taken); numbers, or lists of them."""
        line = {"stage": self.stage, "step": step, "time": round(time.time(), 3), **figures}
        size = os.fstat(self._file).st_size
        data = _line_text(line).encode()
        try:
            if os.write(self._file, data) < len(data):
                raise OSError("a write was cut short")
        except OSError as error:
            os.ftruncate(self._file, size)  # no half line for the next one to be written behind
            self._lost += 1
            if self._lost == 1:
                LOG.warning("%s: cannot be written (%s); training goes on", self.path, error.strerror or error)

    def close(self) -> None:
        """No more lines come. Tells how many could not be written."""
        os.close(self._file)
        if self._lost:
            LOG.warning("%s: %d lines of figures could not be written", self.path, self._lost)


class NewLines:
    """Reads a metrics.jsonl that another process writes, from its beginning; whole lines alone, damaged ones not.

    A file that was put in its place, as on resume, is read from its beginning again.
    """

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE
        self._place, self._inode = 0, -1

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines that have come since."""
        while True:
            try:
                with self.path.open("rb") as file:
                    if (inode := os.fstat(file.fileno()).st_ino) != self._inode:
                        self._place, self._inode = 0, inode
                    file.seek(self._place)
                    whole, newline, _ = file.read(_MOST_BYTES).rpartition(b"\n")
            except FileNotFoundError:
                return
            if not newline:
                return
            self._place += len(whole) + 1
            yield from (line for text in whole.split(b"\n") if (line := _whole_line(text)) is not None)

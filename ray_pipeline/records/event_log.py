"""What a stage's processes tell, as lines of JSON: time, level, rank, stage, step, phase, message, seconds of a span.

Each process has a file of its own beside the text that it prints: `logs/rank-3.jsonl`, `logs/stage.jsonl`. What the
package logs goes there, and what Python code prints; warnings are shown on the terminal by whoever watches the run.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ray_pipeline.records.rank_output import output_file, output_to
from ray_pipeline.settings.run_folder import LOGS

PACKAGE = logging.getLogger("ray_pipeline")
LEVELS = ("debug", "info", "warning", "error")
_MOST_TEXT = 4000  # characters of one message


class EventLog(logging.Handler):
    """Writes records to a file, with where this process stands; a disk that is full costs the lines and no more."""

    def __init__(self, path: Path, **fields: Any):
        super().__init__()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self.fields: dict[str, Any] = {"rank": None, "stage": None, "step": None, "phase": None, **fields}

    def emit(self, record: logging.LogRecord) -> None:
        event = {
            "time": round(record.created, 6), "level": record.levelname.lower(), **self.fields,
            "message": record.getMessage()[:_MOST_TEXT], **getattr(record, "span", {}),
        }  # fmt: skip
        try:
            self._file.write(json.dumps(event, default=str) + "\n")
        except (OSError, ValueError):
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: a log that fails is no reason to disturb what it tells of."""

    def close(self) -> None:
        self._file.close()
        super().close()


def stand_at(**place: Any) -> None:
    """What this process logs from now on is said at this stage, step and phase."""
    for handler in PACKAGE.handlers:
        if isinstance(handler, EventLog):
            handler.fields |= place


class _Told:
    """A stream whose whole lines are logged as well."""

    def __init__(self, stream: TextIO, level: int):
        self._stream, self._level, self._line = stream, level, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in filter(str.strip, lines):
            PACKAGE.log(self._level, "%s", line, extra={"span": {"printed": True}})
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def recorded(folder: Path, name: str, level: str = "info") -> Iterator[None]:
    """Within, what this process prints and logs is in the stage's `logs/NAME.log` and `logs/NAME.jsonl`.

    Args:
        name: `rank-0`, or `stage`. level: the least that is logged, of `LEVELS`; spans are "debug".
    """
    rank = int(name.removeprefix("rank-")) if name.startswith("rank-") else None
    before = PACKAGE.level, PACKAGE.propagate, sys.stdout, sys.stderr
    with output_to(output_file(folder, name)):
        events = EventLog(folder / LOGS / f"{name}.jsonl", rank=rank, stage=folder.name.partition("-")[0])
        PACKAGE.addHandler(events)
        PACKAGE.setLevel(level.upper())
        PACKAGE.propagate = False
        sys.stdout, sys.stderr = _Told(sys.stdout, logging.INFO), _Told(sys.stderr, logging.INFO)
        try:
            yield
        finally:
            level_before, PACKAGE.propagate, sys.stdout, sys.stderr = before
            PACKAGE.setLevel(level_before)
            PACKAGE.removeHandler(events)
            events.close()


class EventFiles:
    """The events of a stage's processes, as they come. `name`: of one of them (`rank-3`); None: of all."""

    def __init__(self, folder: Path, name: str | None = None):
        self.folder, self.pattern = folder / LOGS, f"{name or '*'}.jsonl"
        self._places: dict[Path, tuple[int, int]] = {}

    def read(self) -> list[dict[str, Any]]:
        """What was written since the last time, in the order of time."""
        found: list[dict[str, Any]] = []
        for path in self.folder.glob(self.pattern):
            try:
                inode = path.stat().st_ino
                before, place = self._places.get(path, (inode, 0))
                with path.open("rb") as file:
                    file.seek(place if before == inode else 0)
                    whole, newline, _ = file.read().rpartition(b"\n")
            except OSError:  # an attempt that begins takes away the files of the one before
                continue
            if newline:
                self._places[path] = (inode, (place if before == inode else 0) + len(whole) + 1)
                found += filter(None, map(_event, whole.split(b"\n")))
        return sorted(found, key=lambda event: event["time"])


def _event(text: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("time"), int | float) else None


def event_text(event: dict[str, Any]) -> str:
    """`12:03:41 rank 3  sft step 12  warning  the loss rose ...`."""
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    who = "stage " if event.get("rank") is None else f"rank {event['rank']}"
    where = f"{event.get('stage') or ''}" + ("" if event.get("step") is None else f" step {event['step']}")
    level = "" if event["level"] == "info" else f"{event['level']}: "
    seconds = f"  {event['seconds']:.3f} s" if "seconds" in event else ""
    return f"{clock} {who}  {where}  {level}{event['message']}{seconds}"

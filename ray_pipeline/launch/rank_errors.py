"""How a rank's end is told: where it stood, what it ended in, and which rank's error is the cause of the others'.

A rank writes its status (stage, step, phase) and its error into `<stage folder>/errors`, so that the launcher can tell
the cause from its echoes on the other ranks, and a user's mistake from a bug, whichever way the ranks were started.
The status outlives a rank that is killed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.launch.heartbeat import STACKS_WANTED, Heartbeat, beat_file
from ray_pipeline.records.artifacts import write_json
from ray_pipeline.records.event_log import stand_at

LOG = logging.getLogger(__name__)
WORKERS_LOCK = ".workers.lock"
ERRORS = "errors"
FROZEN = "frozen.json"  # what `frozen_ranks` found in this attempt; those of earlier ones get a number
_STATUS_BYTES = 512
_SOURCE_LINE = re.compile(r"\[[^\]]*\.(cc|cpp|h|hpp):\d+\] ")  # where in gloo or NCCL the error was raised


class RankStatus:
    """Where a rank stands, in a file: one small write per change, readable after the process is gone.

    It also counts the seconds of each phase, and logs them as spans.
    """

    def __init__(self, folder: Path, rank: int, coordinate: Mapping[str, int], stage: str):
        (folder / ERRORS).mkdir(parents=True, exist_ok=True)
        self._file = os.open(_status_file(folder, rank), os.O_WRONLY | os.O_CREAT, 0o644)
        self._state: dict[str, Any] = {
            "stage": stage, "step": None, "phase": "starting", "coordinate": dict(coordinate)
        }  # fmt: skip
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()
        self.at("starting")

    def at(self, phase: str, step: int | None = None) -> None:
        """The rank begins `phase` ("forward/backward", "optimizer step", ...) of `step`; None: the step goes on."""
        now = time.monotonic()
        phase_before, seconds, self._since = self._state["phase"], now - self._since, now
        self._seconds[phase_before] = self._seconds.get(phase_before, 0.0) + seconds
        LOG.debug("%s", phase_before, extra={"span": {"seconds": round(seconds, 6)}})
        self._state["phase"] = phase
        if step is not None:
            self._state["step"] = step
        stand_at(stage=self._state["stage"], step=self._state["step"], phase=phase)
        os.pwrite(self._file, json.dumps(self._state).ljust(_STATUS_BYTES).encode(), 0)

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in each phase since this was asked last."""
        taken, self._seconds = self._seconds, {}
        return taken


def _status_file(folder: Path, rank: int) -> Path:
    return folder / ERRORS / f"status-{rank}.json"


def last_status(folder: Path, rank: int) -> dict[str, Any] | None:
    """Where the rank stood last, or None if it never got to say."""
    try:
        return json.loads(_status_file(folder, rank).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not written yet, half written, or damaged
        return None


def status_text(status: Mapping[str, Any]) -> str:
    """`pretrain, step 3, forward/backward`."""
    step = [] if status["step"] is None else [f"step {status['step']}"]
    return ", ".join([status["stage"], *step, status["phase"]])


def rank_text(rank: int, status: Mapping[str, Any] | None) -> str:
    """`rank 1 (pp=0 dp=1 sp=0 tp=0)`."""
    if status is None:
        return f"rank {rank}"
    coordinate = status["coordinate"]
    return f"rank {rank} ({' '.join(f'{axis}={coordinate[axis]}' for axis in ('pp', 'dp', 'sp', 'tp'))})"


def lost_message(error: BaseException) -> str | None:
    """`all-reduce along dp: Timed out ...` where the error is of a message that did not arrive, else None."""
    # Here, because torch is not needed to launch ranks.
    from torch.distributed import DistError

    from model.parallel.collectives import CollectiveFailed

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CollectiveFailed):
            return _tidy(str(seen))
        # gloo's errors are plain RuntimeErrors that begin with the path of its source file.
        if isinstance(seen, DistError) or (isinstance(seen, RuntimeError) and "gloo" in str(seen)):
            text = _tidy(str(seen))
            # DeepSpeed, which names no axis, talks along the replicas alone.
            frames = traceback.extract_tb(seen.__traceback__)
            zero = any(f"{os.sep}deepspeed{os.sep}" in frame.filename for frame in frames)
            return f"ZeRO along replica: {text}" if zero else text
        seen = seen.__cause__
    return None


def _tidy(text: str) -> str:
    """The first line without gloo's source file and its advice."""
    return _SOURCE_LINE.sub("", text.strip().splitlines()[0]).partition(" This is typically caused")[0].rstrip(".")


class RankScope:
    """What surrounds a rank's work: the shared workers' lock, and a record of the error it may end in."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self._lock: TextIO | None = None
        self._heartbeat: Heartbeat | None = None

    def __enter__(self) -> RankScope:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / WORKERS_LOCK).open("a")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        errors = self.folder / ERRORS
        errors.mkdir(exist_ok=True)
        earlier = [_error_file(self.folder, self.rank), _status_file(self.folder, self.rank)]
        for path in (*earlier, beat_file(errors, self.rank)):
            path.unlink(missing_ok=True)  # of an attempt that Ray Train has restarted
        if self.rank == 0:
            (errors / STACKS_WANTED).unlink(missing_ok=True)
            if (errors / FROZEN).exists():
                (errors / FROZEN).rename(errors / f"frozen-{len(frozen_reports(self.folder))}.json")
        self._heartbeat = Heartbeat(errors, self.rank)
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            place = traceback.extract_tb(trace)[-1] if trace is not None else None
            lost = None if isinstance(error, UserError) else lost_message(error)
            write_json(
                _error_file(self.folder, self.rank),
                {
                    "rank": self.rank,
                    "user_error": isinstance(error, UserError),
                    "lost_message": lost,
                    "cause": str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}",
                    "line": f"{place.filename}:{place.lineno}" if place else "",
                    "traceback": "".join(traceback.format_exception(kind, error, trace)),
                    "time": time.time(),
                },
            )
        assert self._lock is not None and self._heartbeat is not None
        self._heartbeat.stop()
        self._lock.close()


def _error_file(folder: Path, rank: int) -> Path:
    return folder / ERRORS / f"rank-{rank}.json"


def rank_errors(folder: Path) -> list[dict[str, Any]]:
    """What ranks recorded since the launch, the cause first: what is no lost message, and then the earliest."""
    found = []
    for path in (folder / ERRORS).glob("rank-*.json"):
        with suppress(FileNotFoundError, ValueError):  # a rank that starts again takes its own away; or a damaged one
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return sorted(found, key=lambda entry: (entry["lost_message"] is not None, entry["time"]))


def frozen_reports(folder: Path) -> list[dict[str, Any]]:
    """What the launcher's watch said of ranks that froze, in any attempt of this launch: `text`, `stacks`, `time`."""
    found = []
    for path in (folder / ERRORS).glob("frozen*.json"):
        with suppress(FileNotFoundError, json.JSONDecodeError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return sorted(found, key=lambda page: page["time"])


def raise_user_error(folder: Path) -> None:
    """Raise what a rank recorded as the user's mistake, if any did."""
    for entry in rank_errors(folder):
        if entry["user_error"]:
            raise UserError(entry["cause"])


def explain_failure(folder: Path, fallback: str, details: str) -> StageFailed:
    """The error a stage ended in, from what its ranks recorded; a rank that was killed recorded its status alone."""
    raise_user_error(folder)
    errors = rank_errors(folder)
    silent = _silent_ranks(folder, errors)
    frozen = (folder / ERRORS / FROZEN).exists() and all(entry["lost_message"] is not None for entry in errors)
    if frozen:  # and was ended, which the others' errors are echoes of
        page = frozen_reports(folder)[-1]
        return StageFailed(page["text"], f"Python stacks of all ranks:\n\n{page['stacks']}\n\n{details}")
    if not errors:
        return StageFailed(fallback + silent, details)
    first = errors[0]
    text = "\n\n".join(f"rank {entry['rank']}:\n{entry['traceback']}" for entry in errors)
    if first["lost_message"] is None:
        return StageFailed(f"rank {first['rank']}: {first['cause']} ({first['line']})", f"{text}\n\n{details}")
    status = last_status(folder, first["rank"])
    where = "" if status is None else f" in {status_text(status)}"
    cause = f"{rank_text(first['rank'], status)}: no answer{where}: {first['lost_message']}"
    return StageFailed(cause + silent, f"{text}\n\n{details}")


def _silent_ranks(folder: Path, errors: list[dict[str, Any]]) -> str:
    """`. No error from rank 1 (...), killed or hanging in pretrain, step 3, forward/backward`."""
    told = {entry["rank"] for entry in errors}
    ranks = sorted(int(path.stem.removeprefix("status-")) for path in (folder / ERRORS).glob("status-*.json"))
    found = ((rank, last_status(folder, rank)) for rank in ranks if rank not in told)
    texts = [f"{rank_text(rank, status)}: {status_text(status)}" for rank, status in found if status is not None]
    if not texts:
        return ""
    more = f"; and {len(texts) - 4} more" if len(texts) > 4 else ""
    return f". Killed or hanging, last seen in: {'; '.join(texts[:4])}{more}"

"""Run a verb in this process under a clock, and tell whether it ended as a verb may: no traceback, no hang."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ray_pipeline.cli import main

SECONDS = 10.0
# What is asked of the hub ends at once; see huggingface_hub.constants, read at its import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


class Hung(BaseException):
    """Raised into what takes too long; no `except Exception` stops it."""


@dataclass(frozen=True)
class Ending:
    """How a verb ended: exit code, what it wrote, and what is wrong with that (None where nothing is)."""

    code: int | None
    out: str
    err: str
    fault: str | None


@contextlib.contextmanager
def clock(seconds: float = SECONDS) -> Iterator[None]:
    """Raise `Hung` in the main thread after so many seconds of computing, or on the clock.

    Where more processes want the cores than there are, each waits for its turn, and the clock's limit grows by as much.
    """
    crowd = max(1.0, (os.getloadavg()[0] + 1) / (os.cpu_count() or 1))

    def ring(*_: object) -> None:
        raise Hung

    clocks = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, crowd * seconds))
    before = [signal.signal(kind, ring) for kind, _, _ in clocks]
    for _, timer, limit in clocks:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (kind, timer, _), handler in zip(clocks, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(kind, handler)


def end_of(arguments: Sequence[str], *, seconds: float = SECONDS, codes: Sequence[int] = (0, 1, 2)) -> Ending:
    """Run a verb. A fault is an exception, a hang, a traceback in what it wrote, or an exit code not among `codes`."""
    out, err = io.StringIO(), io.StringIO()
    code: int | None = None
    fault = None
    started = time.process_time()
    try:
        with clock(seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(arguments))
    except Hung:
        fault = f"hung for {seconds:g} seconds"
    except BaseException as error:  # noqa: BLE001  whatever it is, a verb let it out
        import traceback

        fault = "".join(traceback.format_exception(error)[-3:])
    else:
        if code not in codes:
            fault = f"exit code {code}"
        elif "Traceback (most recent call last)" in out.getvalue() + err.getvalue():
            fault = "wrote a traceback"
        elif code == 2 and not err.getvalue().strip():
            fault = "refused without a word"
        elif time.process_time() - started > seconds:
            fault = f"took {time.process_time() - started:.1f} seconds"
    return Ending(code, out.getvalue(), err.getvalue(), fault)


def report(faults: Sequence[tuple[object, str]]) -> str:
    """The first faults, each with what led to it, and how many there are."""
    shown = "\n".join(f"- {what!r}\n  {fault[-1500:]}" for what, fault in faults[:12])
    return f"{len(faults)} faults, the first:\n{shown}" if faults else ""

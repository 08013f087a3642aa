"""An engine that is a program of its own: started on a socket of its own, waited for, ended with this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import writing
from ray_pipeline.serving import leash
from ray_pipeline.serving.environments import cache_folder, outside

KEPT_LOGS = 10
KEPT_LINES = 6  # of a log, in a message
POLL_SECONDS = 0.2
STOP_SECONDS = leash.GRACE_SECONDS + 5
LONGEST_SOCKET = 100  # Linux takes 107 bytes, macOS 103


@dataclass
class EngineProcess:
    """A running program.

    Attributes:
        socket: the Unix socket that it listens on: no port that others could take or reach.
        log: all that it prints.
    """

    socket: Path
    log: Path
    process: subprocess.Popen[bytes]
    _ended: bool = field(default=False, init=False)

    @property
    def alive(self) -> bool:
        """Whether the program runs."""
        return self.process.poll() is None

    def stop(self) -> None:
        """End it, softly first; may be called twice."""
        if self._ended:
            return
        self._ended = True
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # which the leash waits for
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.socket.parent, ignore_errors=True)


def start_process(
    name: str, words: Callable[[Path], Sequence[str | Path]], environment: Mapping[str, str]
) -> EngineProcess:
    """Start a program.

    Args:
        words: its command line, given the path of the socket. environment: variables beside those of this process.
    """
    log = _new_log(name)
    folder = tempfile.mkdtemp(prefix=f"{name}-")  # nobody else may look into it
    if len(folder) > LONGEST_SOCKET - 2:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix=f"{name}-", dir="/tmp")
    socket = Path(folder, "s")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-S", "-P", leash.__file__, *map(str, words(socket))],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=outside() | dict(environment), cwd=folder,
        )  # fmt: skip
    return EngineProcess(socket, log, process)


def _new_log(name: str) -> Path:
    folder = cache_folder() / "logs"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob(f"{name}-*.log"))[: -KEPT_LOGS + 1]:
            old.unlink(missing_ok=True)
        log = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 1000:03}.log"
        log.touch()
    return log


def wait_until_ready(running: EngineProcess, name: str, model: str) -> None:
    """Until its `/health` answers.

    Raises:
        UserError: it ended before, with the end of its log and the log's name. It is stopped in every case but success.
    """
    import httpx

    transport = httpx.HTTPTransport(uds=str(running.socket))
    try:
        with httpx.Client(transport=transport, base_url=f"http://{name}", timeout=10, trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/health").status_code == 200:
                        return
                if not running.alive:
                    raise UserError(
                        f"{name} cannot serve {model}: it ended while it was starting. Its log is {running.log}; it "
                        f"says:\n  {end_of_log(running.log)}"
                    )
                time.sleep(POLL_SECONDS)
    except BaseException:
        running.stop()
        raise


def end_of_log(log: Path) -> str:
    """The lines that name the error first, as far as one can tell; else the last ones."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    # Of several processes the first to fail has the reason; later errors say that it is gone.
    named = [line for line in lines if "Error: " in line]
    return "\n  ".join(line[:300] for line in (named[:3] or lines[-KEPT_LINES:]))

"""A confined process while it runs: started, watched for what it uses, killed. What it may do is `sandbox`'s matter."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from ray_pipeline.isolation import child as sandbox_child

FILE_BYTES, FOLDER_BYTES = 16 << 20, 64 << 20
OPEN_FILES, FILES, THREADS = 64, 1000, 128


@dataclass(frozen=True)
class Confined:
    """A confined process, its folder, and what it writes to once its rights are gone.

    Attributes:
        writes: whether it can change files. stdin: device and inode of the nameless file it reads.
    """

    process: subprocess.Popen[bytes]
    ready: IO[bytes]
    folder: Path
    writes: bool
    stdin: tuple[int, int]

    def overrun(self) -> Literal["threads", "disk"] | None:
        """What it has used too much of by now."""
        with contextlib.suppress(OSError, IndexError):  # it has ended meanwhile
            if int(_stat_fields(self.process.pid)[17]) > THREADS:
                return "threads"
        if self.writes and self._used() > FOLDER_BYTES:
            return "disk"
        return None

    def _used(self) -> int:
        """Bytes on disk in its folder, which can hold no folders, and of deleted files that it still holds open."""
        total = 0
        for count, entry in enumerate(os.scandir(self.folder), start=1):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
            if count > FILES:
                return FOLDER_BYTES + 1
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for entry in os.scandir(f"/proc/{self.process.pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    held = entry.stat()
                    nameless = stat.S_ISREG(held.st_mode) and held.st_nlink == 0
                    if nameless and (held.st_dev, held.st_ino) != self.stdin:
                        total += held.st_blocks * 512
        return total


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the process's state on, the third of proc(5)'s fields."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextlib.contextmanager
def confined(
    order: dict[str, Any], *, stdin: str = "", channel: tuple[int, ...] = (), silent: bool = False
) -> Iterator[Confined]:
    """Start a process, confine it, have it execute the order's source; killed and reaped in the end.

    Args:
        channel: file descriptors that the program finds under this name. silent: nothing of what it prints is kept.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True))
        # Files without a name: the process can neither wait for the parent nor read its order twice.
        given = stack.enter_context(_nameless(stdin.encode("utf-8", "surrogatepass")))
        job = stack.enter_context(_nameless(json.dumps(order | {"writable": folder, "channel": channel}).encode()))
        reading, writing = os.pipe()
        ready = stack.enter_context(os.fdopen(reading, "rb"))
        command = [sys.executable, "-s", "-P", "-B", "-X", "utf8", sandbox_child.__file__]
        output = subprocess.DEVNULL if silent else subprocess.PIPE
        with os.fdopen(writing, "wb"):
            process = subprocess.Popen(
                [*command, str(job.fileno()), str(writing)],
                stdin=given,
                stdout=output,
                stderr=output,
                pass_fds=(job.fileno(), writing, *channel),
                cwd=folder,
                env=_environment(folder),
                start_new_session=True,
            )
        stack.callback(_close, process)
        inode = os.fstat(given.fileno())
        yield Confined(process, ready, Path(folder), order["landlock"], (inode.st_dev, inode.st_ino))


@contextlib.contextmanager
def _nameless(content: bytes) -> Iterator[IO[bytes]]:
    """A file in no folder that can only be read."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        with open(f"/proc/self/fd/{file.fileno()}", "rb") as again:
            yield again


def _environment(folder: str) -> dict[str, str]:
    # PYTHONHASHSEED: a program prints a set in the same order in every run, so a resumed training scores it alike.
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **one_thread}


def end(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.kill()
    return process.wait()


def _close(process: subprocess.Popen[bytes]) -> None:
    end(process)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()

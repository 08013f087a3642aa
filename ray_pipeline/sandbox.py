"""Untrusted Python programs in a process of their own that can do nothing but compute.

What a program cannot do, and what keeps it from it (`sandbox_child` takes the rights away before the first line runs):
run on (a wall clock, RLIMIT_CPU), use much memory (RLIMIT_AS) or disk (RLIMIT_FSIZE, a watched folder), start other
programs or reach a network (a seccomp filter), read or change the user's files (Landlock), see the environment (it is
empty), touch other processes (the filter, no capabilities), print for ever (output is counted), outlive its parent.

Neither root nor namespaces are needed: both are missing in many containers. As it can start no other process, killing
the one kills all.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import IO, Any, Literal

from ray_pipeline import sandbox_child
from ray_pipeline.errors import UserError
from ray_pipeline.sandbox_filter import MACHINES, filter_program

Status = Literal["ok", "error", "timeout", "memory", "output", "disk", "killed"]

OUTPUT_BYTES = 1 << 20
FILE_BYTES, FOLDER_BYTES = 16 << 20, 64 << 20
OPEN_FILES = 64
_POLL_SECONDS = 0.05
# What Python itself reads. Nothing of the user's is below these.
_SYSTEM = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo",
    "/sys/devices/system/cpu",
)  # fmt: skip


@dataclass(frozen=True)
class SandboxResult:
    """What a program did.

    Attributes:
        stdout, stderr: what it printed, at most `OUTPUT_BYTES` together.
        status: ok (exit code 0), error (any other), timeout, memory (MemoryError), output (printed too much), disk
            (wrote too much), killed (by a signal: it crashed).
        seconds: of wall time, the interpreter's start included.
    """

    stdout: str
    stderr: str
    status: Status
    exit_code: int
    seconds: float


def run_python(
    source: str,
    *,
    stdin: str = "",
    cpu_seconds: float = 5.0,
    memory_bytes: int = 1 << 30,
    wall_seconds: float = 10.0,
    network: bool = False,
) -> SandboxResult:
    """Run a program and wait for its end, which comes after `wall_seconds` at the latest.

    Args:
        stdin: what it reads. memory_bytes: address space, the interpreter's own 30 MB included.
        network: sockets are allowed.
    Raises:
        UserError: this machine cannot confine a program, so none is run.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        order = _order(source, Path(folder), cpu_seconds, memory_bytes, network)
        with _started(order, stdin, folder) as (process, ready):
            out, err, overrun = _watch(process, started + wall_seconds, Path(folder))
            code = _end(process)
            if overrun is None and not ready.read():
                raise UserError(_unavailable(err.decode("utf-8", "replace").strip()[-300:]))
    status = overrun or _status(code)
    text = [part.decode("utf-8", "replace") for part in (out, err)]
    return SandboxResult(text[0], text[1], status, code, time.monotonic() - started)


def check_sandbox() -> None:
    """Raise UserError where untrusted programs cannot be confined. Runs an empty one (some 30 ms)."""
    run_python("")


def _unavailable(reason: str) -> str:
    return (
        f"untrusted programs cannot be confined on this machine ({reason}), so none is run. They need Linux on x86_64 "
        'or aarch64 with seccomp filters. Leave out the reward "code" and the tool "python" here.'
    )


def _order(source: str, folder: Path, cpu_seconds: float, memory_bytes: int, network: bool) -> dict[str, Any]:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        raise UserError(_unavailable(f"{sys.platform} on {machine}"))
    landlock = sandbox_child.landlock_version() > 0
    return {
        "source": source,
        "parent": os.getpid(),
        "landlock": landlock,
        "readable": [*_SYSTEM, sys.prefix, sys.base_prefix],
        "writable": str(folder),
        # Not RLIMIT_NPROC: it counts all processes of the user, the trainer's too, and does not bind root.
        "limits": {
            "RLIMIT_CPU": max(1, ceil(cpu_seconds)),
            "RLIMIT_AS": memory_bytes,
            "RLIMIT_FSIZE": FILE_BYTES,
            "RLIMIT_NOFILE": OPEN_FILES,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
        },
        "filter": filter_program(machine, network=network, files=landlock),
    }


@contextlib.contextmanager
def _started(order: dict[str, Any], stdin: str, folder: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """The confined process, and what it writes to once its rights are gone; killed and reaped in the end."""
    with contextlib.ExitStack() as stack:
        # Files without a name: the process can neither wait for the parent nor read its order twice.
        given = stack.enter_context(tempfile.TemporaryFile())
        given.write(stdin.encode("utf-8", "surrogatepass"))
        given.seek(0)
        job = stack.enter_context(tempfile.TemporaryFile())
        job.write(json.dumps(order).encode())
        job.seek(0)
        reading, writing = os.pipe()
        ready = stack.enter_context(os.fdopen(reading, "rb"))
        command = [sys.executable, "-s", "-P", "-B", "-X", "utf8", sandbox_child.__file__]
        with os.fdopen(writing, "wb"):
            process = subprocess.Popen(
                [*command, str(job.fileno()), str(writing)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(job.fileno(), writing),
                cwd=folder,
                env=_environment(folder),
                start_new_session=True,
            )
        stack.callback(_close, process)
        yield process, ready


def _environment(folder: str) -> dict[str, str]:
    # PYTHONHASHSEED: a program prints a set in the same order in every run, so a resumed training scores it alike.
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **one_thread}


def _watch(process: subprocess.Popen[bytes], deadline: float, folder: Path) -> tuple[bytes, bytes, Status | None]:
    """Collect output until the process ends; the third is what it did too much of."""
    assert process.stdout is not None and process.stderr is not None
    out, err = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, out)
        selector.register(process.stderr, selectors.EVENT_READ, err)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(out), bytes(err), "timeout"
            for key, _ in selector.select(min(left, _POLL_SECONDS)):
                chunk = os.read(key.fd, min(1 << 16, 1 + OUTPUT_BYTES - len(out) - len(err)))
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
                if len(out) + len(err) > OUTPUT_BYTES:
                    return bytes(out), bytes(err), "output"
            if _used(folder) > FOLDER_BYTES:
                return bytes(out), bytes(err), "disk"
    while process.poll() is None:  # it closed its output and goes on
        if time.monotonic() > deadline:
            return bytes(out), bytes(err), "timeout"
        if _used(folder) > FOLDER_BYTES:
            return bytes(out), bytes(err), "disk"
        time.sleep(_POLL_SECONDS / 10)
    return bytes(out), bytes(err), None


def _used(folder: Path) -> int:
    """Bytes on disk below the working folder, which can hold no folders."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def _end(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.kill()
    return process.wait()


def _close(process: subprocess.Popen[bytes]) -> None:
    _end(process)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()


def _status(code: int) -> Status:
    if code == 0:
        return "ok"
    if code == sandbox_child.OUT_OF_MEMORY:
        return "memory"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"  # RLIMIT_CPU: the soft limit, or the hard one where the first was ignored
    return "killed" if code < 0 else "error"

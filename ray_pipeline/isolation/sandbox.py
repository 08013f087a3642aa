"""Untrusted Python programs in a process of their own that can do nothing but compute.

What a program cannot do, and what keeps it from it (`child` takes the rights away before the first line runs):
run on (a wall clock, RLIMIT_CPU), use much memory (RLIMIT_AS) or disk (RLIMIT_FSIZE, a watched folder and watched open
files), start other programs or many threads, reach a network (a seccomp filter), read or change the user's files
(Landlock), see the environment (it is empty), touch other processes (the filter, Landlock's scopes, no capabilities),
print forever (output is counted), outlive its parent. It can ask whether a path exists, and how large it is.

Neither root nor namespaces are needed: both are missing in many containers. As it can start no other process, killing
the one kills all.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ray_pipeline.errors import UserError
from ray_pipeline.isolation import child as sandbox_child
from ray_pipeline.isolation import judge as sandbox_judge
from ray_pipeline.isolation import remote as sandbox_remote
from ray_pipeline.isolation.filter import MACHINES, filter_program
from ray_pipeline.isolation.process import FILE_BYTES, OPEN_FILES, Confined, confined, end

Status = Literal["ok", "error", "timeout", "memory", "output", "disk", "threads", "killed"]

OUTPUT_BYTES = 1 << 20
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
            (wrote too much, or too many files), threads (started too many), killed (by a signal: it crashed).
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
    without_landlock: bool = False,
) -> SandboxResult:
    """Run a program and wait for its end, which comes after `wall_seconds` at the latest.

    Args:
        stdin: what it reads. memory_bytes: address space, the interpreter's own 30 MB included.
        network: sockets are allowed.
        without_landlock: run it also where the kernel has no Landlock, though it can then read the user's files.
    Raises:
        UserError: this machine cannot confine a program, so none is run.
    """
    deadline = time.monotonic() + wall_seconds
    order = _order(source, cpu_seconds, memory_bytes, network=network, without_landlock=without_landlock)
    with confined(order, stdin=stdin) as program:
        return _result(program, [program], deadline)


def run_judged(
    solution: str, tests: str, *, seconds: float, memory_bytes: int = 1 << 30, without_landlock: bool = False
) -> bool:
    """Whether a program passes tests (Python that raises where it is wrong), each in a confined process of its own.

    The program's process sees what the tests call it with, and neither their text nor what they expect.

    Raises:
        UserError: this machine cannot confine a program, so none is run.
    """
    deadline = time.monotonic() + seconds
    # The token proves that the tests were reached and did not end early.
    token = secrets.token_hex(16)
    asks = f"from {sandbox_judge.__name__} import judge\njudge(channel, {solution!r}, {tests!r})\nprint({token!r})"
    serves = f"from {sandbox_remote.__name__} import Peer\nPeer(*channel, serves=True).serve()"
    judge, judged = (
        _order(source, seconds, memory_bytes, modules=modules, without_landlock=without_landlock)
        for source, modules in ((asks, (sandbox_remote, sandbox_judge)), (serves, (sandbox_remote,)))
    )
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as ends:  # of the two pipes; the processes have their own copies
            questions, answers = os.pipe(), os.pipe()
            for descriptor in (*questions, *answers):
                ends.callback(os.close, descriptor)
            first = stack.enter_context(confined(judge, channel=(answers[0], questions[1])))
            second = stack.enter_context(confined(judged, channel=(questions[0], answers[1]), silent=True))
        result = _result(first, [first, second], deadline)
    return result.status == "ok" and token in result.stdout


def check_sandbox(*, without_landlock: bool = False) -> None:
    """Raise UserError where untrusted programs cannot be confined. Runs an empty one (some 30 ms)."""
    run_python("", without_landlock=without_landlock)


def sandbox_problem(*, without_landlock: bool = False) -> str | None:
    """Why untrusted programs cannot be confined on this machine; None where they can."""
    try:
        check_sandbox(without_landlock=without_landlock)
    except UserError as error:
        return str(error)
    return None


def _unavailable(reason: str) -> str:
    return (
        f"untrusted programs cannot be confined on this machine ({reason}), so none is run. They need Linux on x86_64 "
        'or aarch64 with seccomp filters and Landlock. Leave out the reward "code" and the tool "python" here.'
    )


def _order(
    source: str,
    cpu_seconds: float,
    memory_bytes: int,
    *,
    network: bool = False,
    modules: Sequence[ModuleType] = (),
    without_landlock: bool = False,
) -> dict[str, Any]:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        raise UserError(_unavailable(f"{sys.platform} on {machine}"))
    landlock = sandbox_child.landlock_version() > 0
    if not landlock and not without_landlock:
        raise UserError(
            f"{_unavailable('its kernel has no Landlock')} Or let them run and read every file that you can read: "
            "--set grpo.scoring.without_landlock=true for the reward, --set tools.without_landlock=true for the tool, "
            "--without-landlock for `eval`."
        )
    return {
        "source": source,
        # Their text: the package's own files are not among those that the process may read.
        "modules": {module.__name__: Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules},
        "parent": os.getpid(),
        "landlock": landlock,
        "network": network,
        "readable": [*_SYSTEM, sys.prefix, sys.base_prefix],
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


def _result(program: Confined, watched: Sequence[Confined], deadline: float) -> SandboxResult:
    """Wait until the first program ends, or one of the watched has used too much; kill what is left."""
    started = time.monotonic()
    out, err, overrun = _watch(program.process, watched, deadline)
    codes = [end(each.process) for each in watched]
    for each in watched:
        if overrun is None and not each.ready.read():
            raise UserError(_unavailable(err.decode("utf-8", "replace").strip()[-300:]))
    status = overrun or _status(codes[0])
    text = [part.decode("utf-8", "replace") for part in (out, err)]
    return SandboxResult(text[0], text[1], status, codes[0], time.monotonic() - started)


def _watch(
    process: subprocess.Popen[bytes], watched: Sequence[Confined], deadline: float
) -> tuple[bytes, bytes, Status | None]:
    """Collect output until the process ends; the third is what was too much."""
    assert process.stdout is not None and process.stderr is not None
    out, err = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, out)
        selector.register(process.stderr, selectors.EVENT_READ, err)
        while selector.get_map():
            left = deadline - time.monotonic()
            for key, _ in selector.select(max(0.0, min(left, _POLL_SECONDS))):
                chunk = os.read(key.fd, min(1 << 16, 1 + OUTPUT_BYTES - len(out) - len(err)))
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
                if len(out) + len(err) > OUTPUT_BYTES:
                    return bytes(out), bytes(err), "output"
            if (overrun := _overrun(watched, deadline)) and selector.get_map():
                return bytes(out), bytes(err), overrun
    while process.poll() is None:  # it closed its output and goes on
        if overrun := _overrun(watched, deadline):
            return bytes(out), bytes(err), overrun
        time.sleep(_POLL_SECONDS / 10)
    return bytes(out), bytes(err), None


def _overrun(watched: Sequence[Confined], deadline: float) -> Status | None:
    if time.monotonic() > deadline:
        return "timeout"
    return next(filter(None, (each.overrun() for each in watched)), None)


def _status(code: int) -> Status:
    if code == 0:
        return "ok"
    if code == sandbox_child.OUT_OF_MEMORY:
        return "memory"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"  # RLIMIT_CPU: the soft limit, or the hard one where the first was ignored
    return "killed" if code < 0 else "error"

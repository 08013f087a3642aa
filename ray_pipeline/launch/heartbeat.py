"""Signs of life of a rank: a thread of it writes, every second, whether it moves, waits for others, or stands still.

It also gives the rank's Python stack when the launcher's watch (`frozen_ranks`) asks for it, and that of a rank of the
same machine which no longer answers.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ray_pipeline.records.artifacts import atomic_path

BEAT = 1.0  # seconds between two
STACKS_WANTED = "stacks-wanted.json"
_BYTES = 1024
_DUMP_SECONDS = 10.0
# Where a rank stands that waits for another rank, and where one that waits for something which is no rank: a process of
# its own, an answer over the network, a thread. The latter have limits of their own.
_FOR_RANKS = ("/torch/distributed/", "/deepspeed/", "/parallel/collectives.py", "/engine/reduction.py",
              "/engine/pipeline/messages_between.py")  # fmt: skip
_FOR_OTHERS = ("/threading.py", "/selectors.py", "/subprocess.py", "/socket.py", "/ssl.py", "/queue.py",
               "/multiprocessing/", "/concurrent/", "/asyncio/", "/ray/", "/wandb/")  # fmt: skip


def beat_file(folder: Path, rank: int) -> Path:
    """Of a rank, in the folder of errors."""
    return folder / f"beat-{rank}.json"


def stack_file(folder: Path, rank: int) -> Path:
    """Where the stack of a rank is put when it was asked for."""
    return folder / f"stack-{rank}.txt"


def machine() -> str:
    """What processes have in common that can see each other: the host, its boot, the space of process ids."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_stat(pid: int) -> tuple[str, float, int] | None:
    """State letter, seconds of CPU and start (in ticks since boot) of a process; None where the system knows none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(fields[19])


def is_here(beat: Mapping[str, Any]) -> bool:
    """Whether the process that wrote it lives on this machine, and is not another one by now."""
    found = process_stat(beat["pid"]) if beat["machine"] == machine() else None
    return found is not None and found[2] == beat["started"] and found[0] not in "ZX"


def python_stack(pid: int) -> str:
    """py-spy's view of a process, which it does not stop for that; or why there is none."""
    spy = Path(sys.executable).with_name("py-spy")
    command = [str(spy) if spy.exists() else "py-spy", "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DUMP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy could not look at process {pid}: {error}"
    if done.returncode == 0:
        return done.stdout.strip()
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"py-spy may not look at process {pid} ({last}). Let it: run as root, or with the capability SYS_PTRACE."


class Heartbeat:
    """The thread of this process's rank; `folder` is that of errors. Watches the thread that makes it."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self._watched, self._native = threading.get_ident(), threading.get_native_id()
        self._ended = threading.Event()
        found = process_stat(os.getpid())
        self._state: dict[str, Any] = {
            "beat": 0, "pid": os.getpid(), "started": found[2] if found else 0, "machine": machine(),
        }  # fmt: skip
        self._stack: list[tuple[str, int]] = []
        self._moved, self._cpu, self._io = time.monotonic(), 0.0, 0
        self._answered = ""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat; the first is written before this returns, so that a rank stopped right away is missed too."""
        self._file = os.open(beat_file(self.folder, self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """The rank ends, in whatever way; nobody is to wait for it."""
        self._ended.set()
        self._thread.join(timeout=2 * BEAT)
        beat_file(self.folder, self.rank).unlink(missing_ok=True)
        if not self._thread.is_alive():  # else it looks at a stack, and may still write
            os.close(self._file)

    def _run(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # a disk that is full for a while is no reason to seem frozen
                self._beat()
                self._answer()

    def _beat(self) -> None:
        frame = sys._current_frames().get(self._watched)
        stack = _places(frame)
        cpu, io = time.process_time(), _io_bytes()
        if stack != self._stack or self._waits_for_disk():
            self._stack, self._cpu, self._io, self._moved = stack, cpu, io, time.monotonic()
        innermost, line = stack[0] if stack else ("", 0)
        self._state |= {
            "beat": self._state["beat"] + 1,
            # Since the thread was last seen at another line: seconds, of these with the CPU, and bytes in and out.
            "still": time.monotonic() - self._moved,
            "cpu": cpu - self._cpu,
            "bytes": io - self._io,
            "for_ranks": any(part in innermost for part in _FOR_RANKS),
            "for_others": any(part in innermost for part in _FOR_OTHERS),
            "at": f"{innermost}:{line}"[-300:],
        }
        os.pwrite(self._file, json.dumps(self._state).ljust(_BYTES).encode(), 0)

    def _waits_for_disk(self) -> bool:
        """A large file on a slow disk takes its time, without a byte that this process would see pass."""
        try:
            fields = Path(f"/proc/self/task/{self._native}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return fields[0] == "D"

    def _answer(self) -> None:
        """Give the stacks that are asked for, once a request; end those that are frozen here, if it says so."""
        try:
            wanted = json.loads((self.folder / STACKS_WANTED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if wanted["id"] == self._answered:
            return
        self._answered = wanted["id"]
        frozen = {int(rank): beat for rank, beat in wanted["frozen"].items()}
        if wanted["end"]:
            end_here(frozen)
            return
        if self.rank not in frozen:
            self._put(self.rank, self._own_stack())
        for rank, beat in frozen.items():
            if rank == self.rank:  # it stands still, and this thread does not
                self._put(rank, self._own_stack())
            elif is_here(beat) and not stack_file(self.folder, rank).exists():
                self._put(rank, python_stack(beat["pid"]))

    def _put(self, rank: int, text: str) -> None:
        with atomic_path(stack_file(self.folder, rank), durable=False) as aside:
            aside.write_text(text + "\n", encoding="utf-8")

    def _own_stack(self) -> str:
        seen = python_stack(os.getpid())
        if not seen.startswith("py-spy"):
            return seen
        frames = "".join(traceback.format_stack(sys._current_frames().get(self._watched)))
        return f"{seen}\nSeen from within the process:\n{frames.rstrip()}"


def end_here(frozen: Mapping[int, Mapping[str, Any]]) -> None:
    """Kill those of the frozen ranks whose process is on this machine: stopped, they would never end by themselves."""
    for beat in frozen.values():
        if is_here(beat):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(beat["pid"], signal.SIGKILL)


def _places(frame: FrameType | None) -> list[tuple[str, int]]:
    """File and line of every frame, the innermost first."""
    out: list[tuple[str, int]] = []
    while frame is not None:
        out.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return out


def _io_bytes() -> int:
    """What this process has read and written; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    counted = dict(line.split(": ") for line in lines)
    return sum(int(counted.get(name, 0)) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))

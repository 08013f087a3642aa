"""Calls of user functions in processes of their own, with a time limit for each call. No rewards, no tools."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_pipeline.errors import UserError
from ray_pipeline.hardware import num_cpus

# Importing sympy or torch takes seconds on a busy machine; a module that hangs at import must not hang the run.
START_SECONDS = 120.0
IMPORTING = -1


@dataclass(frozen=True)
class Call:
    """A function's address ("module:function") and JSON values to call it with."""

    function: str
    arguments: tuple[Any, ...]

    @property
    def seed(self) -> int:
        """Of the random draws the function may make: by what it is given, not by when or where it runs."""
        text = json.dumps([self.function, self.arguments], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Outcome:
    """What a function returned, or why it returned nothing (it raised, took too long, or its process died)."""

    value: Any = None
    error: str | None = None


@dataclass
class _Worker:
    """One process. `current` is the call it works on: None while idle, `IMPORTING` while it imports."""

    process: subprocess.Popen[bytes]
    current: int | None = None
    deadline: float = 0.0
    imports: deque[str] = field(default_factory=deque)
    received: bytearray = field(default_factory=bytearray)

    def send(self, order: Mapping[str, Any], seconds: float) -> None:
        assert self.process.stdin is not None
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # it died; its closed output tells
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    def line(self) -> bytes | None:
        """The answer, None while it is incomplete; an empty one where the process has died."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            return b""
        self.received += chunk
        if not chunk.endswith(b"\n"):
            return None
        line = bytes(self.received)
        self.received.clear()
        return line

    def kill(self) -> None:
        """End it with the processes it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()


class FunctionPool:
    """Processes that call functions. They are started when first needed, and replaced when killed.

    A fresh interpreter each (never a fork): the parent may hold torch's threads and a GPU.
    """

    def __init__(
        self,
        functions: Sequence[str],
        *,
        timeout_seconds: float,
        processes: int = 0,
        offered: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            functions: addresses of all that will be called; imported before the clock of a call runs.
            processes: 0 for one per core.
            offered: keyword arguments, JSON values, for those functions that take them.
        """
        self.functions = list(functions)
        self.timeout_seconds, self.offered = timeout_seconds, dict(offered or {})
        self.processes = processes or num_cpus()
        self._workers: list[_Worker] = []

    def __enter__(self) -> FunctionPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes; a later call starts new ones."""
        while self._workers:
            self._workers.pop().kill()

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcome of each call, in their order; it does not depend on how many processes there are.

        Raises:
            UserError: a function cannot be imported.
        """
        outcomes: list[Outcome | None] = [None] * len(calls)
        pending = deque(range(len(calls)))
        while len(self._workers) < min(self.processes, len(calls)):
            self._workers.append(self._start())
        try:
            while any(outcome is None for outcome in outcomes):
                self._assign(calls, pending)
                self._wait(outcomes)
        except BaseException:
            self.close()  # a late answer must not be taken for the next call's
            raise
        return [outcome for outcome in outcomes if outcome is not None]

    def _start(self) -> _Worker:
        given = [str(self.timeout_seconds), json.dumps(self.offered)]
        command = [sys.executable, "-P", "-m", "ray_pipeline.isolation.function_child", *given]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        # One thread each: as many processes as cores would otherwise start cores squared threads.
        settings = {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | settings,
            start_new_session=True,
        )
        worker = _Worker(process, imports=deque(self.functions))
        self._import_next(worker)
        return worker

    def _import_next(self, worker: _Worker) -> None:
        if not worker.imports:
            worker.current = None
            return
        worker.current = IMPORTING
        worker.send({"call": worker.imports.popleft(), "arguments": None}, START_SECONDS)

    def _assign(self, calls: Sequence[Call], pending: deque[int]) -> None:
        for place, worker in enumerate(self._workers):
            if worker.current is None and pending:
                if worker.process.poll() is not None:  # it died since its last answer, so no call is to blame
                    worker.kill()
                    self._workers[place] = self._start()
                    continue
                worker.current = pending.popleft()
                call = calls[worker.current]
                order = {"call": call.function, "arguments": call.arguments, "seed": call.seed}
                worker.send(order, self.timeout_seconds)

    def _wait(self, outcomes: list[Outcome | None]) -> None:
        """Take what has come, and end what is overdue."""
        busy = [worker for worker in self._workers if worker.current is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            first = min(worker.deadline for worker in busy)
            ready = selector.select(max(0.0, first - time.monotonic()))
        for key, _ in ready:
            line = key.data.line()
            if line is not None:
                self._take(key.data, line, outcomes)
        now = time.monotonic()
        for worker in busy:
            if worker.current is not None and worker.deadline <= now:
                self._replace(worker, f"took longer than {self._allowed(worker):g} seconds", outcomes)

    def _allowed(self, worker: _Worker) -> float:
        return START_SECONDS if worker.current == IMPORTING else self.timeout_seconds

    def _take(self, worker: _Worker, line: bytes, outcomes: list[Outcome | None]) -> None:
        if not line:
            self._replace(worker, f"its process died ({_death(worker.process)})", outcomes)
            return
        reply = json.loads(line)
        if "refused" in reply:
            raise UserError(reply["refused"])
        if worker.current == IMPORTING:
            self._import_next(worker)
            return
        assert worker.current is not None
        outcomes[worker.current] = Outcome(reply.get("value"), reply.get("error"))
        worker.current = None

    def _replace(self, worker: _Worker, reason: str, outcomes: list[Outcome | None]) -> None:
        if worker.current == IMPORTING:
            raise UserError(f"importing {', '.join(self.functions)} in a process of its own {reason}. Fix the module.")
        assert worker.current is not None
        outcomes[worker.current] = Outcome(error=reason)
        worker.kill()
        self._workers[self._workers.index(worker)] = self._start()


def _death(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"

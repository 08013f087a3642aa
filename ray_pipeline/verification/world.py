"""Runs layouts one after the other, each in fresh processes for all its stages, and survives those that crash or hang.

Processes are forked from one server that has torch and DeepSpeed imported already: a layout starts in a fraction of a
second, and nothing that the one before left behind (process groups, DeepSpeed's module state) can reach it.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray_pipeline.launch.fork_server import environment, fork_context
from ray_pipeline.launch.launchers import worker_environment
from ray_pipeline.layout.layout import Layout
from ray_pipeline.verification.cases import Case, Tolerance
from ray_pipeline.verification.compare import Result, difference, judge
from ray_pipeline.verification.worker import WHERE, Job, run_rank

GRACE = 5.0  # seconds the other ranks have to tell their error after the first one told its own


class Verifier:
    """Compares layouts with one process. `with Verifier(...) as verifier: verifier.run([case])`

    Args:
        timeout: seconds one case may take; a collective may wait for half of it.

    Attributes:
        files: of this project, that the ranks have imported until now.
    """

    def __init__(self, device: str, tolerances: Mapping[str, Tolerance], *, timeout: float = 300.0):
        self.device, self.tolerances, self.timeout = device, tolerances, timeout
        self.references: dict[str, Path] = {}  # the repr of a case in one process -> its trace
        self.files: set[str] = set()

    def __enter__(self) -> Verifier:
        self._folder = TemporaryDirectory(prefix="verify-parallel-")
        self._context = fork_context()
        return self

    def __exit__(self, *exc: object) -> None:
        self._folder.cleanup()

    def run(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Train in the cases' layout, the same for all, and compare; references are made when they are first needed.

        The cases share processes until one fails; those behind it get new ones.
        """
        pending = list(cases)
        while pending:
            for result in self._together(tuple(pending)):
                pending.pop(0)
                yield result

    def _together(self, cases: tuple[Case, ...]) -> Iterator[Result]:
        """Results of the cases up to the first that fails."""
        missing = tuple(case for case in cases if repr(_alone(case)) not in self.references)
        failed: Result | None = None
        for case, made in zip(missing, self._run(tuple(map(_alone, missing)), is_reference=True), strict=False):
            if made.error:
                failed = replace(made, case=case, error=f"the reference in one process failed: {made.error}")
            else:
                self.references[repr(_alone(case))] = self._trace(case)
        if failed is not None:
            cases = cases[: cases.index(failed.case)]
        yield from self._run(cases, is_reference=False)
        if failed is not None:
            yield failed

    def _trace(self, case: Case) -> Path:
        """Where the trace of a case in one process lies, or will; what it trains on lies beside it."""
        name = hashlib.sha256(repr(_alone(case)).encode()).hexdigest()[:16]
        return Path(self._folder.name, f"reference-{name}.pt")

    def _run(self, cases: tuple[Case, ...], *, is_reference: bool) -> Iterator[Result]:
        """In fresh processes, up to the first that fails."""
        if not cases:
            return
        traces = tuple(self._trace(case) for case in cases)
        with TemporaryDirectory(dir=self._folder.name) as folder:
            data = tuple(trace.with_suffix("") for trace in traces)
            job = Job(cases, traces, is_reference, Path(folder), data, timeout=self.timeout / 2)
            start = time.monotonic()
            for case, answers in zip(cases, self._answers(job), strict=False):
                yield self._result(case, answers, time.monotonic() - start)
                start = time.monotonic()

    def _result(self, case: Case, answers: Mapping[int, Mapping[str, Any]], seconds: float) -> Result:
        result = Result(case, seconds, error=_cause(answers))
        self.files |= {file for answer in answers.values() for file in answer.get("files", ())}
        if not result.error:
            result.comparison = answers[0]["comparison"]
            result.wrong = judge(result.comparison, self.tolerances[case.precision])
            apart = [rank for rank, answer in answers.items() if _disagree(answers[0], answer)]
            if apart:
                result.wrong.append(f"ranks {apart} report another loss or gradient norm than rank 0")
        return result

    def _answers(self, job: Job) -> Iterator[dict[int, dict[str, Any]]]:
        """Of each case: rank -> its answer. Those of a case in which a rank fails are the last."""
        with self._processes(job) as (processes, connections):
            for _ in job.cases:
                answers = self._next_answers(job, processes, connections)
                yield answers
                if any("error" in answer for answer in answers.values()):
                    return

    def _next_answers(
        self, job: Job, processes: list[Any], connections: Mapping[Connection, int]
    ) -> dict[int, dict[str, Any]]:
        """Rank -> its answer. Ranks that end without one, or not at all, get an error in their place."""
        waiting = dict(connections)
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready: list[Any] = wait(list(waiting), left)
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    processes[rank].join(1.0)
                    answers[rank] = _dead(rank, processes[rank].exitcode, job.log(rank))
                if "error" in answers[rank]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank in waiting.values():
            answers[rank] = _hanging(rank, processes[rank], job.log(rank))
        return {rank: answers[rank] for rank in range(job.layout.gpus)}

    @contextmanager
    def _processes(self, job: Job) -> Iterator[tuple[list[Any], dict[Connection, int]]]:
        """One process per rank with the pipe it answers through; all gone when the block ends."""
        processes: list[Any] = []
        connections: dict[Connection, int] = {}
        try:
            with environment(worker_environment(job.layout.gpus, 1, self.device)):
                for rank in range(job.layout.gpus):
                    ours, theirs = self._context.Pipe(duplex=False)
                    process = self._context.Process(target=run_rank, args=(rank, job, theirs), daemon=True)
                    process.start()
                    theirs.close()
                    processes.append(process)
                    connections[ours] = rank
            yield processes, connections
        finally:
            for process in processes:
                process.join(0 if process.exitcode is not None else 0.5)
                process.kill()
                process.join()


def _alone(case: Case) -> Case:
    """The same in one process."""
    return replace(case, layout=Layout(device=case.layout.device))


def _dead(rank: int, exit_code: int, log: Path) -> dict[str, Any]:
    """The answer of a rank that ended without one, with the last line it wrote."""
    said = log.read_text(errors="replace").strip().splitlines()
    died = f"rank {rank}: died (exit code {exit_code})"
    return {"error": f"{died}: {said[-1]}" if said else died}


def _hanging(rank: int, process: Any, log: Path) -> dict[str, Any]:
    """The answer of a rank that did not come to an end, with the innermost line it is in outside of torch."""
    os.kill(process.pid, WHERE)
    time.sleep(0.3)
    frames = re.findall(r'File "(.+)", line (\d+) in (\w+)', log.read_text(errors="replace"))
    ours = next(((Path(file).name, line) for file, line, _ in frames if "/torch/" not in file), None)
    where = f" in {ours[0]}:{ours[1]}" if ours else ""
    return {"error": f"rank {rank}: still busy or waiting{where} when time was up", "echo": True, "late": True}


def _cause(answers: Mapping[int, Mapping[str, Any]]) -> str:
    """The error that the others are echoes of, or who waited and who was waited for, or an empty string."""
    failed = [answer for answer in answers.values() if "error" in answer]
    causes = [answer for answer in failed if not answer.get("echo")]
    late = [answer for answer in failed if answer.get("late")]
    echoes = [answer for answer in failed if answer.get("echo") and not answer.get("late")]
    return "; ".join(str(answer["error"]) for answer in causes[:1] or [*echoes[:1], *late[:1]])


def _disagree(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return difference([*a["losses"], *a["norms"]], [*b["losses"], *b["norms"]]) > 1e-6

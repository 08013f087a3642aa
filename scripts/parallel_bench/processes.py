"""The processes that competitors of one size share, from the driver's side."""

from __future__ import annotations

import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from typing import Any

from scripts.parallel_bench.rank import rank_main
from scripts.parallel_bench.task import Row, Task

PATIENCE = 600.0  # seconds without an answer


class CompetitorFailed(RuntimeError):
    """A competitor's process ended with an error, did not answer, or computed something else."""


class World:
    """Ranks that are started once and sleep between two turns. A context manager, so that none is left behind."""

    def __init__(self, task: Task, ranks: int, device_type: str):
        context = multiprocessing.get_context("forkserver")
        self._folder = tempfile.TemporaryDirectory(prefix="bench_parallel-")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, task, ranks, rank, f"{self._folder.name}/store", device_type)
            process = context.Process(target=rank_main, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def build(self, row: Row) -> None:
        """Make the competitor's step on every rank."""
        self._ask(row.name, "build", row)

    def losses(self, name: str, steps: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of a competitor's first steps."""
        return self._ask(name, "losses", name, steps)[0]

    def timed(self, name: str, first: int, count: int) -> list[tuple[float, float]]:
        """Of `count` steps after one that is not counted: the slowest rank's seconds, all ranks' CPU seconds."""
        by_step = zip(*self._ask(name, "time", name, first, count), strict=True)
        return [(max(wall for wall, _ in ranks), sum(cpu for _, cpu in ranks)) for ranks in by_step]

    def memory(self) -> list[dict[str, int]]:
        """Peak memory of each rank since it was started."""
        return self._ask("memory", "memory")

    def _ask(self, who: str, *command: Any) -> list[Any]:
        """Every rank's answer; `who` is named where one is missing."""
        try:
            for pipe in self._pipes:
                pipe.send(command)
        except BrokenPipeError:
            pass  # its last words are still to be read
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(PATIENCE):
                    raise CompetitorFailed(f"{who}: rank {rank} has not answered for {PATIENCE:.0f} s")
                kind, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                raise CompetitorFailed(f"{who}: rank {rank} is gone") from None
            if kind == "error":
                raise CompetitorFailed(f"{who}, rank {rank}:\n{value}")
            answers.append(value)
        return answers

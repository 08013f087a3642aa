"""Blocks of documents spread over the cluster's processes, with few of them under way at a time.

What is done to a block is the caller's matter. Results depend neither on the number of workers nor on the order in
which they finish: they are given in the order of the blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

# Half a CPU: a worker must find a place on one core next to the driver's own work.
CPUS_PER_WORKER = 0.5
# One process reads and packs: it could not keep more workers busy.
MOST_WORKERS = 32
# Blocks under way for each worker: one it works on, one that waits for it.
AHEAD = 2

Block = TypeVar("Block")
Result = TypeVar("Result")


class _Worker:
    """Body of a worker process; what it works with (a tokenizer, patterns) is made once, not for every block."""

    def __init__(self) -> None:
        self.work: Callable[[Any], Any] | None = None

    def run(self, made_of: list[Any], block: Any) -> Any:
        """`made_of`: a reference, in a list so that Ray does not fetch what it stands for with every block."""
        if self.work is None:
            make, arguments = ray.get(made_of[0])
            self.work = make(*arguments)
        return self.work(block)


def map_blocks(
    make: Callable[..., Callable[[Block], Result]], arguments: tuple[Any, ...], blocks: Iterable[Block]
) -> Iterator[Result]:
    """`make(*arguments)`, made once in each worker process, of every block, in order.

    A worker for each core up to MOST_WORKERS, but none without a block. A worker that dies is started again and its
    blocks are done again.
    """
    count = min(MOST_WORKERS, max(1, int(ray.cluster_resources().get("CPU", 1))))
    made_of = [ray.put((make, arguments))]
    actor: Any = ray.remote(num_cpus=CPUS_PER_WORKER, max_restarts=-1, max_task_retries=-1)(_Worker)
    workers: list[Any] = []
    waiting: deque[Any] = deque()
    try:
        for number, block in enumerate(blocks):
            if number < count:
                workers.append(actor.remote())
            waiting.append(workers[number % count].run.remote(made_of, block))
            if len(waiting) >= AHEAD * len(workers) and len(workers) == count:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    finally:
        for worker in workers:
            ray.kill(worker)

"""Processes forked from one server that has torch and DeepSpeed imported: a rank starts in a fraction of a second.

One that imports them anew takes eight seconds of a core before its first step. What a rank leaves behind (process
groups, DeepSpeed's module state) goes with its process and never reaches the server.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

    from torch.multiprocessing.spawn import ProcessContext

# The last two are what DeepSpeed loads when its engine is built, over a second of work for each rank.
PRELOADED = [
    "torch", "deepspeed", "torch.distributed.tensor",
    "ray_pipeline.verification.steps", "ray_pipeline.engine.zero", "ray_pipeline.training.trainer",
    "torch.utils.cpp_extension", "deepspeed.runtime.zero.muon.muon_optimizer",
]  # fmt: skip


def fork_context() -> ForkServerContext:
    """The context whose processes are forked; the first one starts the server, which lives as long as this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a while: the server inherits them when it starts; torch and DeepSpeed read them on import."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def share_cores() -> None:
    """Let the threads of this process, a rank on CPUs, work until they wait (Linux's SCHED_BATCH).

    Otherwise every message that wakes a rank pushes another one off its core. Where ranks outnumber cores that takes
    half of all time (docs/launch-and-faults.md has what was measured).
    """
    if not hasattr(os, "SCHED_BATCH"):  # another system than Linux
        return
    for thread in os.listdir("/proc/self/task"):  # gloo's are there already in a worker of Ray Train
        with suppress(OSError):  # it has ended, or a container forbids it
            os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))


def start_ranks(
    function: Callable[..., None], args: tuple[Any, ...], ranks: int, variables: Mapping[str, str]
) -> ProcessContext:
    """Start `function(rank, *args)` on `ranks` processes, in this process's environment with `variables` set."""
    import torch.multiprocessing as mp

    fork_context()
    with environment(variables):
        job = (dict(os.environ), function, args)
        return mp.start_processes(_rank, job, ranks, join=False, start_method="forkserver")


def _rank(rank: int, variables: Mapping[str, str], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Body of one process: the server's environment is that of its start, so the starter's comes with the job."""
    import torch

    share_cores()
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    function(rank, *args)

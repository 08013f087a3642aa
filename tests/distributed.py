"""Run a function on several gloo ranks from a test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ray_pipeline.launch.fork_server import start_ranks
from ray_pipeline.launch.launchers import worker_environment


def _rank(rank: int, function: Callable, world: int, folder: str, timeout: timedelta, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "29500"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(function: Callable, world: int, *args: Any, timeout: timedelta = timedelta(minutes=10)) -> list:
    """`function(rank, *args)` on `world` forked processes; their return values in rank order.

    Args:
        timeout: of collectives of the whole world.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = (function, world, folder, timeout, args)
        ranks = start_ranks(_rank, job, world, worker_environment(world, world, "cpu"))
        while not ranks.join():
            pass
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]

"""One process of the benchmark: builds what competitors of its size do in a step, then runs what the driver asks for.

Competitors share processes so that all fit into memory side by side and can take turns; peak memory is measured in
processes of its own.
"""

from __future__ import annotations

import os
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from scripts.parallel_bench.task import MTP_WEIGHT, SEED, Row, Task, make_batch


def rank_main(pipe: Connection, task: Task, ranks: int, rank: int, store: str, device_type: str) -> None:
    """Entry of the process. Everything but the steps' own messages goes through `pipe`.

    Commands: ("build", row), ("losses", name, steps), ("time", name, first step, steps), ("memory",). Answers:
    ("ok", value) or ("error", traceback).
    """
    try:
        device = _start(ranks, rank, store, device_type)
        steps: dict[str, Any] = {}
        while True:
            command, *arguments = pipe.recv()
            pipe.send(("ok", _answer(task, steps, device, command, *arguments)))
    except EOFError:
        pass  # the driver is gone
    except Exception:  # noqa: BLE001 - whatever it is, the driver is to show it
        pipe.send(("error", traceback.format_exc()))
    # Without clean-up, which would wait for peers that failed.
    os._exit(0)


def _start(ranks: int, rank: int, store: str, device_type: str) -> torch.device:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if ranks > 1:
        backend = "nccl" if device_type == "cuda" else "gloo"
        given: dict[str, Any] = {"device_id": device} if device_type == "cuda" else {}
        # Competitors of other sizes have their turns between two messages.
        patience = timedelta(hours=1)
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=patience, **given
        )
    return device


def _answer(task: Task, steps: dict[str, Any], device: torch.device, command: str, *arguments: Any) -> Any:
    if command == "build":
        row = arguments[0]
        steps[row.name] = build_step(task, row, device)
        return None
    if command == "memory":
        return _peak_memory(device)
    name, *numbers = arguments
    if command == "losses":
        return [steps[name](make_batch(task, index)) for index in range(numbers[0])]
    assert command == "time"
    return _timed(task, steps[name], device, *numbers)


def build_step(task: Task, row: Row, device: torch.device) -> Any:
    """The competitor's function from a global batch to (loss, gradient norm)."""
    from scripts.parallel_bench import peer_pipeline, peers

    builders = {
        "ours": _build_ours,
        "plain": peers.build_plain,
        "ddp": peers.build_ddp,
        "fsdp2": peers.build_fsdp2,
        "pipelining": peer_pipeline.build_pipelining,
    }
    return builders[row.kind](task, row, device)


def _build_ours(task: Task, row: Row, device: torch.device) -> Any:
    from model.parallel.mesh import Mesh, MeshSizes
    from ray_pipeline.engine.engine import Engine
    from ray_pipeline.engine.options import EngineOptions
    from ray_pipeline.objectives.cross_entropy import CrossEntropy

    axes = ("pp", "dp", "sp", "tp", "ep")
    mesh = Mesh(MeshSizes(**{axis: row.settings.get(axis, 1) for axis in axes}))
    others: Any = {key: value for key, value in row.settings.items() if key not in axes}
    engine = Engine(
        task.model,
        mesh,
        EngineOptions(seed=SEED, optimizer=task.optimizer, micro_batch=row.micro_batch, device=device, **others),
    )
    objective = CrossEntropy(MTP_WEIGHT)

    def step(batch: Any) -> tuple[float, float]:
        stats = engine.train_step(batch, objective, task.optimizer.lr)
        return stats.loss, stats.grad_norm

    return step


def _timed(task: Task, step: Any, device: torch.device, first: int, count: int) -> list[tuple[float, float]]:
    """(Seconds, seconds of CPU time of all threads) of `count` steps; one before them warms up and is not counted."""
    batches = [make_batch(task, index) for index in range(first, first + count + 1)]
    out = []
    for batch in batches:
        if dist.is_initialized():
            dist.barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        out.append((time.perf_counter() - start, time.process_time() - start_cpu))
    return out[1:]


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: peak resident set of this process, and on a GPU what torch allocated at most."""
    out = {}
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                out["peak_rss_bytes"] = int(line.split()[1]) * 1024
    if device.type == "cuda":
        out["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return out

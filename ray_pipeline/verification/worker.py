"""One rank of one layout: trains, and rank 0 compares with the reference. Runs in a process of its own."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ray_pipeline.verification.cases import Case

WHERE = signal.SIGUSR1


@dataclass(frozen=True)
class Job:
    """What every rank of a layout is told.

    Attributes:
        reference: the trace of one process, written by the layout of one rank and read by the others.
        folder: empty, for the ranks to find each other.
        timeout: seconds a collective may wait.
    """

    case: Case
    reference: Path
    is_reference: bool
    folder: Path
    timeout: float

    def log(self, rank: int) -> Path:
        """What a rank's libraries print, and where it is if it hangs."""
        return self.folder / f"rank-{rank}.log"


def run_rank(rank: int, job: Job, connection: Connection) -> None:
    """Send one answer: `{"losses": ..., "comparison": ...}` or `{"error": ..., "echo": ...}`."""
    from model.parallel.collectives import CollectiveFailed

    _write_to(job.log(rank))
    faulthandler.register(WHERE)  # the launcher asks a rank that hangs where it is
    try:
        answer = _verify(rank, job)
    except Exception as error:  # noqa: BLE001 - whatever a layout dies of is the finding
        place = traceback.extract_tb(error.__traceback__)[-1]
        answer = {
            "error": f"rank {rank}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            f" ({Path(place.filename).name}:{place.lineno})",
            # A collective that failed because another rank had left is not the cause.
            "echo": isinstance(error, CollectiveFailed) or "Connection closed by peer" in str(error),
            "trace": traceback.format_exc(),
        }
    connection.send(answer)
    connection.close()
    os._exit(0)  # groups with a peer that is gone cannot be shut down in order


def _write_to(path: Path) -> None:
    """Send what libraries print, and what the runtime says when it dies, to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _verify(rank: int, job: Job) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from ray_pipeline.verification.compare import compare
    from ray_pipeline.verification.steps import Trace, take_steps

    torch.set_num_threads(1)
    device = torch.device("cpu")
    layout = job.case.layout
    if layout.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(layout.gpus))
    dist.init_process_group(
        "gloo" if layout.device == "cpu" else "cpu:gloo,cuda:nccl", init_method=f"file://{job.folder}/store",
        rank=rank, world_size=layout.gpus, timeout=timedelta(seconds=job.timeout),
    )  # fmt: skip
    trace, _ = take_steps(job.case, device=device, timeout=job.timeout, whole_batch=job.is_reference)
    gathered: list[Any] = [None] * layout.gpus
    dist.all_gather_object(gathered, trace.loads)
    answer: dict[str, Any] = {"losses": trace.losses, "norms": trace.norms}
    if rank == 0:
        loads = [{name: load for step in steps for name, load in step.items()} for steps in zip(*gathered, strict=True)]
        whole = replace(trace, loads=loads)
        if job.is_reference:
            torch.save(vars(whole), job.reference)
        reference = Trace(**torch.load(job.reference, weights_only=True))
        answer["comparison"] = compare(reference, whole)
    return answer

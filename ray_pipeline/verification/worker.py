"""One rank of one layout: trains stage after stage, and rank 0 compares with the reference. In its own process."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.launch.fork_server import share_cores
from ray_pipeline.layout.layout import Layout
from ray_pipeline.verification.cases import Case

if TYPE_CHECKING:
    import torch

    from model.parallel.mesh import Mesh

WHERE = signal.SIGUSR1


@dataclass(frozen=True)
class Job:
    """What every rank of a layout is given.

    Attributes:
        cases: of one layout, one after another in the same processes.
        references: of each case the trace of one process, written by the layout of one rank and read by the others.
        folder: empty, for the ranks to find each other and for what a stage writes.
        data: of each case, below which lies what is trained on, by seed; written with its reference.
        timeout: seconds a collective may wait.
    """

    cases: tuple[Case, ...]
    references: tuple[Path, ...]
    is_reference: bool
    folder: Path
    data: tuple[Path, ...]
    timeout: float

    @property
    def layout(self) -> Layout:
        """Of all its cases."""
        return self.cases[0].layout

    def log(self, rank: int) -> Path:
        """What a rank's libraries print, and where it is if it hangs."""
        return self.folder / f"rank-{rank}.log"


def run_rank(rank: int, job: Job, connection: Connection) -> None:
    """Send an answer for each case, `{"losses", "norms", "files"}`, of rank 0 with its "comparison" and of the last
    maybe `{"error", "echo", ...}` in its place; "files" are those of this project that the rank has imported.
    """
    from model.parallel.collectives import CollectiveFailed

    if job.layout.device == "cpu":
        share_cores()
    _write_to(job.log(rank))
    faulthandler.register(WHERE)  # the launcher asks a rank that hangs where it is
    try:
        for answer in _verify(rank, job):
            connection.send(answer)
    except Exception as error:  # noqa: BLE001 - whatever a layout dies of is the finding
        place = traceback.extract_tb(error.__traceback__)[-1]
        failed = {
            "error": f"rank {rank}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            f" ({Path(place.filename).name}:{place.lineno})",
            # A collective that failed because another rank had left is not the cause.
            "echo": isinstance(error, CollectiveFailed) or "Connection closed by peer" in str(error),
            "trace": traceback.format_exc(),
        }
        connection.send(failed)
    connection.close()
    os._exit(0)  # groups with a peer that is gone cannot be shut down in order


def _write_to(path: Path) -> None:
    """Send what libraries print, and what the runtime says when it dies, to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _verify(rank: int, job: Job) -> Iterator[dict[str, Any]]:
    import torch
    import torch.distributed as dist

    from model.parallel.mesh import Mesh

    torch.set_num_threads(1)
    device = torch.device("cpu")
    layout = job.layout
    if layout.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(layout.gpus))
    dist.init_process_group(
        "gloo" if layout.device == "cpu" else "cpu:gloo,cuda:nccl", init_method=f"file://{job.folder}/store",
        rank=rank, world_size=layout.gpus, timeout=timedelta(seconds=job.timeout),
    )  # fmt: skip
    mesh = Mesh(layout, timeout=timedelta(seconds=job.timeout))
    for index in range(len(job.cases)):
        yield _verify_case(rank, job, index, mesh, device)


def _verify_case(rank: int, job: Job, index: int, mesh: Mesh, device: torch.device) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from ray_pipeline.verification.compare import compare
    from ray_pipeline.verification.steps import Trace, take_reference, take_steps
    from ray_pipeline.verification.written_results import imported_files

    case, path, data = job.cases[index], job.references[index], job.data[index]
    folder = job.folder / str(index)
    if job.is_reference:
        trace = reference = take_reference(case, mesh, device=device, folder=folder, data=data)
    else:
        reference = Trace(**torch.load(path, weights_only=True, mmap=True))
        case, data = case.with_seed(reference.seed), data / str(reference.seed)
        trace = take_steps(case, mesh, device=device, folder=folder, data=data)
    gathered: list[Any] = [None] * job.layout.gpus
    dist.all_gather_object(gathered, trace.loads)
    answer: dict[str, Any] = {"losses": trace.losses, "norms": trace.norms, "files": imported_files()}
    if rank == 0:
        loads = [{name: load for step in steps for name, load in step.items()} for steps in zip(*gathered, strict=True)]
        whole = replace(trace, loads=loads)
        if job.is_reference:
            torch.save(vars(whole), path)
            reference = whole
        answer["comparison"] = compare(reference, whole)
    return answer

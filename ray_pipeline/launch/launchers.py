"""Starts the ranks of a stage: as a Ray Train job, as local processes, or inside this process. Knows nothing of stages.

What ranks end in is told through `rank_errors`.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from ray_pipeline.errors import UserError
from ray_pipeline.hardware import num_cpus
from ray_pipeline.launch.cluster import alive, cpus_per_rank
from ray_pipeline.launch.fork_server import share_cores, start_ranks
from ray_pipeline.launch.frozen_ranks import SECONDS, FrozenWatch
from ray_pipeline.launch.rank_errors import (
    ERRORS,
    WORKERS_LOCK,
    RankScope,
    explain_failure,
    raise_user_error,
    rank_errors,
)
from ray_pipeline.launch.stage_context import RankFunction
from ray_pipeline.records.artifacts import writing
from ray_pipeline.records.event_log import recorded

LOCK_WAIT = 60.0  # seconds a new attempt waits for the workers of a killed one to go
FAREWELL = 3.0  # seconds ranks have to record their errors after one of them ended
# glibc returns large buffers to the kernel at once; keeping them saves 2-3x on big fresh outputs (page faults).
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}


def worker_environment(ranks: int, cores: int, device: str) -> dict[str, str]:
    """Environment variables of every rank; they must be set before torch and DeepSpeed are imported."""
    threads = {"OMP_NUM_THREADS": str(max(1, cores // ranks)), "TOKENIZERS_PARALLELISM": "false"}
    own = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if device == "cuda":  # blocks of many sizes, of which without it a part of the memory cannot be used again
        own = {"PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")}
    ray = {"GLOG_minloglevel": "2", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}  # print means print, not a log of Ray's
    return MALLOC | threads | own | ray


def prepare_folder(folder: Path, *, wait: float = LOCK_WAIT) -> None:
    """Wait until the workers of an earlier, killed attempt are gone; forget the errors they recorded.

    Raises:
        UserError: they still live after `wait` seconds.
    """
    with writing(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((folder / WORKERS_LOCK).open("a"))
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{folder / WORKERS_LOCK}: held for {wait:.0f} s by workers of an earlier run, which still "
                        f"write to this folder. Find them with `fuser {folder / WORKERS_LOCK}`, end them, then resume."
                    ) from None
                time.sleep(0.1)
        shutil.rmtree(folder / ERRORS, ignore_errors=True)


class InlineLauncher:
    """One rank in this process, for debuggers and tests. Leaves a process group that was there alone."""

    def run(self, name: str, function: RankFunction, arguments: dict[str, Any]) -> dict[str, Any]:
        """Call `function` with torch.distributed set up for one rank."""
        import torch.distributed as dist

        folder = Path(arguments["folder"])
        prepare_folder(folder)
        ours = not dist.is_initialized()
        if ours:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            with RankScope(folder, 0):
                return function(arguments)
        finally:
            if ours:
                dist.destroy_process_group()


def _process_rank(
    rank: int, world: int, store: str, timeout: float, function: RankFunction, arguments: dict[str, Any]
) -> None:
    """Body of one forked process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    folder = Path(arguments["folder"])
    with recorded(folder, f"rank-{rank}", arguments.get("log_level", "info")), RankScope(folder, rank):
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", init_method=f"file://{store}/rendezvous", rank=rank, world_size=world,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        value = function(arguments)
        if rank == 0:
            Path(store, "value").write_bytes(pickle.dumps(value))
        dist.barrier()
        dist.destroy_process_group()


class ProcessLauncher:
    """CPU ranks as processes of this machine over gloo, without Ray: for tests and debugging.

    Args:
        timeout_seconds: limit of every collective. frozen_seconds: as `FrozenWatch` takes them.
    """

    def __init__(self, ranks: int, *, timeout_seconds: float = 600.0, frozen_seconds: float = SECONDS):
        self.ranks, self.timeout_seconds, self.frozen_seconds = ranks, timeout_seconds, frozen_seconds

    def run(self, name: str, function: RankFunction, arguments: dict[str, Any]) -> dict[str, Any]:
        """Fork the ranks, wait, and return rank 0's value; no restarts."""
        import torch.multiprocessing as mp

        folder = Path(arguments["folder"])
        prepare_folder(folder)
        with tempfile.TemporaryDirectory() as store:
            job = (self.ranks, store, self.timeout_seconds, function, arguments)
            variables = worker_environment(self.ranks, num_cpus(), "cpu")
            try:
                processes = start_ranks(_process_rank, job, self.ranks, variables)
                with FrozenWatch(folder, self.frozen_seconds):
                    while not processes.join(grace_period=FAREWELL):
                        pass
            except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
                raise explain_failure(folder, f"{name}: a rank's process ended: {error}", str(error)) from None
            return pickle.loads(Path(store, "value").read_bytes())


def _ray_rank(job: dict[str, Any]) -> dict[str, Any] | None:
    """What every Ray Train worker runs."""
    import ray.train

    if job["device"] == "cpu":
        share_cores()
    folder = Path(job["arguments"]["folder"])
    if any(entry["user_error"] for entry in rank_errors(folder)):
        # Ray Train restarts after any error, but a user's mistake stays one: end at once, the launcher tells it.
        return None
    context = ray.train.get_context()
    rank = context.get_world_rank()
    level = job["arguments"].get("log_level", "info")
    with recorded(folder, f"rank-{rank}", level), RankScope(folder, rank):
        usable = max((size for size in job["sizes"] if size <= context.get_world_size()), default=0)
        if usable < context.get_world_size() and not _go_on_with(usable, job["timeout"]):
            return None  # a spare rank: it waits for nothing, and is used again when a lost one comes back
        return job["function"](job["arguments"])


def _go_on_with(ranks: int, timeout: float) -> bool:
    """Make a torch.distributed world of the first `ranks` ranks; False on the others, which have none any more."""
    import torch.distributed as dist

    backend, rank = dist.get_backend_config(), dist.get_rank()
    address: list[Any] = [None]
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            address = [f"tcp://{os.environ['MASTER_ADDR']}:{free.getsockname()[1]}"]
    dist.broadcast_object_list(address, 0)
    dist.destroy_process_group()
    if rank >= ranks:
        return False
    dist.init_process_group(
        backend, init_method=address[0], rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    os.environ["WORLD_SIZE"] = str(ranks)
    return True


class RayLauncher:
    """Ranks as a Ray Train job, restarted after a worker died; the function itself goes on from its newest checkpoint.

    Args:
        ranks: number of workers. device: "cpu" (gloo) or "cuda" (one GPU per worker, nccl with gloo for CPU tensors).
        max_restarts: deaths that are survived. timeout_seconds: limit of every collective.
        frozen_seconds: a rank without a sign of life is named, and ended as if it had died; 0: never.
        elastic: numbers of ranks to go on with while the cluster has not enough for all; none: wait for all.
        first_here: rank 0 runs on this machine, since what it writes is read here, and machines share no folder.
    """

    def __init__(
        self,
        ranks: int,
        device: str,
        *,
        max_restarts: int = 2,
        timeout_seconds: float = 600.0,
        frozen_seconds: float = SECONDS,
        elastic: Sequence[int] = (),
        first_here: bool = False,
    ):
        self.ranks, self.device, self.first_here = ranks, device, first_here
        self.max_restarts, self.timeout_seconds = max_restarts, timeout_seconds
        self.frozen_seconds = frozen_seconds
        self.sizes = sorted({ranks, *elastic})

    def run(self, name: str, function: RankFunction, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run `function` on every rank and return rank 0's value."""
        # Read by Ray Train's controller: it looks at its workers ten times a second, not once in two.
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
        if len(self.sizes) > 1:
            # Right after a node is gone Ray still counts on it once; how long it waits for the workers to fit there.
            os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "30"
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

        folder = Path(arguments["folder"])
        prepare_folder(folder)
        scaling, cores = self.scaling()
        run_options: dict[str, Any] = {
            # A fresh name each time: our own checkpoints decide where to go on, not Ray's.
            "name": f"{name}-{time.time_ns()}",
            "storage_path": str(folder / "ray"),
            "failure_config": FailureConfig(max_failures=self.max_restarts),
            "worker_runtime_env": {"env_vars": worker_environment(self.ranks, cores, self.device)},
        }
        job = {"function": function, "arguments": arguments, "sizes": self.sizes, "timeout": self.timeout_seconds}
        trainer: Any = TorchTrainer(
            cast(Any, _ray_rank),
            train_loop_config=job | {"device": self.device},
            torch_config=TorchConfig(
                backend="gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl", timeout_s=int(self.timeout_seconds)
            ),
            scaling_config=scaling,
            run_config=RunConfig(**run_options),
        )
        try:
            with FrozenWatch(folder, self.frozen_seconds):
                value = trainer.fit().return_value
        except TrainingFailedError as error:
            fallback = f"{name}: its workers died more often than layout.max_restarts={self.max_restarts} times"
            if not isinstance(error, WorkerGroupError):  # the job did not even start; the last line is the cause
                fallback = f"{name}: its workers could not start: {str(error).strip().splitlines()[-1].strip()}"
            raise explain_failure(folder, fallback, str(error)) from None
        finally:
            shutil.rmtree(folder / "ray", ignore_errors=True)
        raise_user_error(folder)
        assert value is not None, "every rank gave up without telling why"
        return value

    def scaling(self) -> tuple[Any, int]:
        """Ray's ScalingConfig, and CPU cores of the machines on which ranks can run.

        Raises:
            UserError: the cluster cannot hold the ranks.
        """
        from ray.train import ScalingConfig

        cluster = alive()
        cluster.refuse_too_small(self.ranks, self.sizes[0], self.device)
        cpus = cluster.cpus_for(self.device)
        share = cpus_per_rank(cpus, self.ranks)
        # With GPUs the CPU share may not decide the placement: a rank goes where its GPU is.
        resources = {"CPU": min(share, 0.01)} | {"GPU": 1.0} if self.device == "cuda" else {"CPU": share}
        workers: Any = self.ranks
        if len(self.sizes) > 1:
            workers = (self.sizes[0], self.ranks)
            # Ray floors the quotient of floats, in which 1.0 holds 0.2 four times: ask for one step less.
            resources["CPU"] = round(resources["CPU"] - 0.0001, 4)
        # Ranks of one machine are neighbours in the grid, whose innermost axes, tp and ep, send most.
        scaling = ScalingConfig(
            num_workers=workers, use_gpu=self.device == "cuda", resources_per_worker=resources,
            placement_strategy="PACK", **self._places(),
        )  # fmt: skip
        return scaling, int(sum(cpus))

    def _places(self) -> dict[str, Any]:
        """Labels of the node that each rank needs; Ray numbers ranks in this order, node by node."""
        return {"label_selector": [node_label(), *[{}] * (self.ranks - 1)]} if self.first_here else {}


def node_label() -> dict[str, str]:
    """The label by which Ray finds the machine that asks."""
    import ray

    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}

"""The Ray cluster that RAY_ADDRESS names: its machines, what ranks there are given, and whether they share a folder."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError
from ray_pipeline.launch.local_ray import asks_for_token, show_token, start_ray

CONNECT_SECONDS = 5.0
PROBE_SECONDS = 60.0  # a worker process on a busy node takes some of them to start
# Keys, proxies and settings of libraries that ranks on other machines need as this process has them.
SHIPPED = (
    "NCCL_", "TORCH_NCCL_", "GLOO_", "HF_", "WANDB_", "RAY_PIPELINE_", "AWS_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One machine of a cluster, by what Ray may hand out there.

    Attributes:
        memory: bytes for processes. accelerator: Ray's name of its GPUs, such as H100; empty if it has none.
    """

    name: str
    cpus: float
    gpus: int
    memory: int
    accelerator: str = ""


@dataclass(frozen=True)
class Cluster:
    """The machines that are alive."""

    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> int:
        """Whole GPUs of all machines."""
        return sum(node.gpus for node in self.nodes)

    def describe(self) -> str:
        """`the Ray cluster has 16 GPUs and 200 CPUs on 3 nodes`."""
        gpus, cpus, nodes = self.gpus, sum(node.cpus for node in self.nodes), len(self.nodes)
        return f"the Ray cluster has {gpus} GPUs and {cpus:g} CPUs on {nodes} node{'s' if nodes != 1 else ''}"

    def cpus_for(self, device: str) -> list[float]:
        """CPUs of the machines on which ranks can run."""
        return [node.cpus for node in self.nodes if node.gpus or device == "cpu"]

    def refuse_too_small(self, ranks: int, least: int, device: str) -> None:
        """Hold `ranks` ranks, of which `least` have to be there, against what Ray may hand out.

        Raises:
            UserError: the cluster cannot hold them.
        """
        if device == "cuda" and self.gpus < least:
            raise UserError(
                f"{least} ranks with a GPU each: {self.describe()}. Use fewer --gpus, --backend cpu, a larger cluster, "
                "or --set layout.wait_for_nodes=SECONDS where it grows on demand."
            )
        if cpus_per_rank(self.cpus_for(device), ranks) == 0.0:
            raise UserError(f"{ranks} ranks: {self.describe()}. Start Ray with CPUs (`ray start --num-cpus`).")


def cpus_per_rank(node_cpus: Sequence[float], ranks: int) -> float:
    """The largest share of a CPU, at most one, at which `ranks` ranks fit on the nodes. Zero when there is no CPU."""
    for parts in range(1, ranks + 1):
        # Ray counts resources in steps of 1/10000; rounding down keeps the last share from missing by one step.
        share = int(10000 / parts) / 10000
        if sum(int(cpus / share + 1e-9) for cpus in node_cpus) >= ranks:
            return share
    return 0.0


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None: Ray is started here. `ray job submit` sets it for its jobs."""
    return os.environ.get("RAY_ADDRESS") or None


def connect(address: str) -> None:
    """Join the cluster.

    Raises:
        UserError: nothing answers there, or it asks for a password that this user does not have.
    """
    ship = {name: value for name, value in os.environ.items() if name.upper().startswith(SHIPPED)}
    try:
        if ":" in address.rpartition("/")[2]:  # Ray itself waits for two minutes
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
            if asks_for_token(host, int(port), CONNECT_SECONDS) and not show_token():
                raise UserError(
                    f"RAY_ADDRESS={address}: the cluster asks for a password, and there is none in ~/.ray/auth_token. "
                    "Copy that file from the machine that started the cluster, or set RAY_AUTH_TOKEN."
                )
        hook = f"{__name__}.{use_cluster_interface.__name__}"
        start_ray(address=address, runtime_env={"env_vars": ship, "worker_process_setup_hook": hook})
    except (OSError, ValueError) as error:  # a port that is no number; ConnectionError is an OSError
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}). Start one with `ray start --head`, or "
            "unset RAY_ADDRESS to use a local one."
        ) from None


def use_cluster_interface() -> None:
    """Let gloo listen where Ray does, in a worker that starts, unless GLOO_SOCKET_IFNAME says where.

    It would take the address of the machine's name, which many systems give as 127.0.0.1 or 127.0.1.1, and ranks on
    other machines could not connect.
    """
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in (found.address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def alive() -> Cluster:
    """The machines of the Ray that this process is connected to."""
    import ray

    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            kinds = [name.partition(":")[2] for name in has if name.startswith("accelerator_type:")]
            gpus = int(has.get("GPU", 0))
            memory = int(has.get("memory", 0))
            name = str(node["NodeManagerHostname"])
            nodes.append(Node(name, has.get("CPU", 0.0), gpus, memory, kinds[0] if gpus and kinds else ""))
    return Cluster(tuple(nodes))


def named_cluster() -> Cluster | None:
    """What the cluster that RAY_ADDRESS names has now; None where it names none. Leaves it again.

    Raises:
        UserError: nothing answers there.
    """
    import ray

    address = cluster_address()
    if address is None:
        return None
    if ray.is_initialized():
        return alive()
    connect(address)
    try:
        return alive()
    finally:
        ray.shutdown()


def wait_for(ranks: int, least: int, device: str, seconds: float) -> None:
    """Ask the autoscaler for machines that hold the ranks, and wait until they are there.

    Raises:
        UserError: after `seconds` the cluster still cannot hold them.
    """
    until, told = time.monotonic() + seconds, False
    try:
        while True:
            try:
                return alive().refuse_too_small(ranks, least, device)
            except UserError as error:
                if time.monotonic() >= until:
                    raise
                if not told:
                    print(f"{str(error).partition('. ')[0]}: waiting up to {seconds:.0f} s for more", flush=True)
                    _ask_for([{"GPU" if device == "cuda" else "CPU": 1}] * ranks)
                told = True
                time.sleep(1.0)
    finally:
        if told:
            _ask_for([])


def _ask_for(bundles: list[dict[str, int]]) -> None:
    """What the autoscaler is to have ready from now on."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def refuse_unshared(folder: Path) -> None:
    """Let every machine read and write a small file in a run's folder.

    Raises:
        UserError: one of them cannot, or does not have this package.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return
    token = secrets.token_hex(8)
    asked = folder / f".shared-{token}"
    task: Any = ray.remote(num_cpus=0, max_retries=0)(_answer_in)
    try:
        asked.write_text(token, encoding="utf-8")
        refs = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(key, soft=False)).remote(
                str(asked), key
            ): key
            for key in nodes
        }
        done, late = ray.wait(list(refs), num_returns=len(refs), timeout=PROBE_SECONDS)
        for ref in late:
            raise UserError(
                f"{nodes[refs[ref]]}: started no worker within {PROBE_SECONDS:.0f} s. Look at its Ray logs."
            )
        for ref in done:
            name = nodes[refs[ref]]
            try:
                read = ray.get(ref)
            except ray.exceptions.RayError as error:
                last = str(error).strip().splitlines()[-1]
                raise UserError(
                    f"{name}: cannot run this program ({last}). Install the same packages on every node."
                ) from None
            answered = folder / f".shared-{token}-{refs[ref]}"
            if read != token or not answered.exists():
                raise UserError(
                    f"{folder}: {name} does not see what is written there, so it is not the same folder on every node. "
                    "Use --output-dir with a folder that all nodes share (NFS, Lustre, a mounted bucket)."
                )
    finally:
        for path in folder.glob(f".shared-{token}*"):
            path.unlink(missing_ok=True)


def _answer_in(asked: str, node: str) -> str | None:
    """What a node reads in the file, which it answers with one beside it."""
    try:
        text = Path(asked).read_text(encoding="utf-8")
        Path(f"{asked}-{node}").write_text(text, encoding="utf-8")
    except OSError:
        return None
    return text

"""Stages that span two nodes of a Ray cluster: a node, the head or the driver is killed, the weights are the same."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.pipeline.driving import TOY, digests, finish, kill, start, wait_until_stage_works

UNTIL = ("--until", "sft")
RUN = ("run", "--config", str(TOY), "--run-name", "toy", "--gpus", "2", "--pp-size", "2", "--no-wandb", *UNTIL)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of this machine alone."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start(*RUN, folder=folder), folder)
    return digests(folder, "toy")


def two_nodes() -> Any:
    """A head and another node, each with room for one rank."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    return cluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made = two_nodes()
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


def in_sft(folder: Path) -> subprocess.Popen:
    """The run, once SFT has saved."""
    process = start(*RUN, folder=folder)
    wait_until_stage_works(process, folder, "toy", "sft", step=1)
    until = time.monotonic() + 120
    while not list((folder / "toy").glob("sft-*/checkpoints/step_*")):
        assert process.poll() is None and time.monotonic() < until, (folder / "output.log").read_text()[-3000:]
        time.sleep(0.05)
    return process


def nodes_of_ranks() -> list[int]:
    """Process ids of this test's raylets whose children are ranks, once for each rank."""
    raylets = [p for p in psutil.Process().children() if p.name() == "raylet"]
    children = {p.pid: [" ".join(child.cmdline()) for child in p.children()] for p in raylets}
    return [pid for pid, lines in children.items() for line in lines if "RayTrainWorker" in line]


def test_the_driver_is_killed(unbroken: dict[str, str], cluster: Any, tmp_path: Path) -> None:
    process = in_sft(tmp_path)
    ranks = nodes_of_ranks()
    assert len(ranks) == len(set(ranks)) == 2, "a rank on each node"
    kill(process)
    finish(start("resume", "toy", *UNTIL, folder=tmp_path), tmp_path)
    assert digests(tmp_path, "toy") == unbroken


def test_a_node_is_killed_and_another_one_comes(unbroken: dict[str, str], cluster: Any, tmp_path: Path) -> None:
    process = in_sft(tmp_path)
    (other,) = cluster.worker_nodes
    cluster.remove_node(other, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    finish(process, tmp_path)
    assert digests(tmp_path, "toy") == unbroken


def test_the_head_is_killed(
    unbroken: dict[str, str], cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = in_sft(tmp_path)
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    assert process.wait(300) not in (0, None)
    cluster.shutdown()
    said = (tmp_path / "output.log").read_text()
    assert "sft FAILED: NodeDiedError" in said and "Traceback (most recent call" not in said
    again = two_nodes()
    monkeypatch.setenv("RAY_ADDRESS", again.address)
    finish(start("resume", "toy", *UNTIL, folder=tmp_path), tmp_path)
    again.shutdown()
    assert digests(tmp_path, "toy") == unbroken

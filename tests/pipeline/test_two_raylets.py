"""Stages that span two nodes of a Ray cluster: a node, the head or the driver is killed, the weights are the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    assert "Go on with:" in said
    again = two_nodes()
    monkeypatch.setenv("RAY_ADDRESS", again.address)
    finish(start("resume", "toy", *UNTIL, folder=tmp_path), tmp_path)
    again.shutdown()
    assert digests(tmp_path, "toy") == unbroken


HERE = "10.213.0.1"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def another_machine(head: str, number: int) -> Iterator[str]:
    """A node with a network and files of Ray's of its own, behind a cable to this one; yields the cable's name here."""
    name, cable, there = f"pipeline{number}", f"rp{number}", f"10.213.{number}.2"
    ip("netns", "add", name)
    try:
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"10.213.{number}.1/24", "dev", cable)
        ip("link", "set", cable, "up")
        for words in (
            ["addr", "add", f"{there}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
            ["route", "add", "default", "via", f"10.213.{number}.1"],
        ):
            ip("-n", name, *words)  # fmt: skip
        ray = f"{sys.executable} -m ray.scripts.scripts start --address {head} --node-ip-address {there}"
        inside = f"mount -t tmpfs none /tmp/ray && exec {ray} --num-cpus 1 --block"
        with Path(os.devnull).open("w") as nowhere:
            command = [
                "ip",
                "netns",
                "exec",
                name,
                "unshare",
                "-m",
                "-p",
                "-f",
                "--mount-proc",
                "--kill-child",
                "sh",
                "-c",
                inside,
            ]
            node = subprocess.Popen(command, stdout=nowhere, stderr=nowhere, start_new_session=True)
        try:
            yield cable
        finally:
            node.kill()
            node.wait()
    finally:
        ip("netns", "del", name)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a head that machines of other networks can reach."""
    from ray.cluster_utils import Cluster

    ip("link", "add", "rp", "type", "veth", "peer", "name", "rp-end")
    ip("addr", "add", f"{HERE}/24", "dev", "rp")
    for end in ("rp", "rp-end"):
        ip("link", "set", end, "up")
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "node_ip_address": HERE}
    )
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made.address
    made.shutdown()
    ip("link", "del", "rp")


@pytest.mark.skipif(os.geteuid() != 0, reason="networks of their own need root")
def test_a_machine_behind_a_cable_that_is_pulled(unbroken: dict[str, str], head: str, tmp_path: Path) -> None:
    with another_machine(head, 1) as cable:
        process = in_sft(tmp_path)
        ip("link", "set", cable, "down")
    with another_machine(head, 2):
        finish(process, tmp_path)
    assert digests(tmp_path, "toy") == unbroken

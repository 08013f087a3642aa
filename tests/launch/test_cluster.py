"""What a Ray cluster is asked for and told: counted without Ray, and on clusters of several raylets of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.cli import main
from ray_pipeline.costs.hardware_table import find_hardware, running_hardware
from ray_pipeline.errors import UserError
from ray_pipeline.launch.cluster import Cluster, Node, alive, connect, cpus_per_rank, refuse_unshared, wait_for
from ray_pipeline.launch.launchers import RayLauncher
from ray_pipeline.launch.local_ray import start_ray
from ray_pipeline.settings.loading import load_config

HEAD = Node("head", 4.0, 0, 16 << 30)
WORKER = Node("worker", 96.0, 8, 1 << 40, "H100")


@given(st.lists(st.integers(0, 8), max_size=4), st.integers(1, 16))
def test_cpu_share_places_every_rank(nodes, ranks):
    share = cpus_per_rank(nodes, ranks)
    if not sum(nodes):
        assert share == 0.0
        return
    assert 0 < share <= 1
    assert sum(int(cpus * 10000) // round(share * 10000) for cpus in nodes) >= ranks


def test_three_ranks_on_two_cores_get_half_a_core_each():
    assert cpus_per_rank([2.0], 3) == 0.5
    assert cpus_per_rank([8.0], 3) == 1.0


def test_ranks_are_held_against_the_machines_that_have_gpus():
    cluster = Cluster((HEAD, WORKER, WORKER))
    cluster.refuse_too_small(16, 16, "cuda")
    assert cluster.cpus_for("cuda") == [96.0, 96.0] and cluster.cpus_for("cpu") == [4.0, 96.0, 96.0]
    with pytest.raises(UserError, match="the Ray cluster has 16 GPUs and 196 CPUs on 3 nodes"):
        cluster.refuse_too_small(17, 17, "cuda")
    cluster.refuse_too_small(17, 9, "cuda")  # elastic: nine would do
    with pytest.raises(UserError, match="Start Ray with CPUs"):
        Cluster((Node("head", 0.0, 0, 0),)).refuse_too_small(1, 1, "cpu")


def test_memory_is_that_of_the_clusters_smallest_gpu():
    config = load_config(None, {})
    smaller = Node("old", 64.0, 4, 1 << 39, "A100-40G")
    found = running_hardware(config, "cuda", Cluster((HEAD, WORKER, smaller)))
    assert found is not None and found.memory == find_hardware("a100-40gb").memory
    assert found.node == 4 and found.host == (1 << 39) // 4
    assert running_hardware(config, "cuda", Cluster((Node("new", 8.0, 8, 1 << 40, "NPU9"),))) is None
    cpus = running_hardware(config, "cpu", Cluster((HEAD, WORKER)))
    assert cpus is not None and cpus.memory == HEAD.memory + WORKER.memory


@pytest.fixture
def sixteen_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without GPUs and two nodes that say they have eight H100 each, named by RAY_ADDRESS."""
    from ray.cluster_utils import Cluster as Raylets

    raylets = Raylets(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for _ in range(2):
        raylets.add_node(num_cpus=8, num_gpus=8, memory=1 << 40, resources={"accelerator_type:H100": 1})
    monkeypatch.setenv("RAY_ADDRESS", raylets.address)
    yield raylets
    raylets.shutdown()


@pytest.mark.slow
def test_a_head_without_gpus_and_two_nodes_of_eight(sixteen_gpus, tmp_path, capsys):
    asked = ["run", "--pp-size", "2", "--output-dir", str(tmp_path), "--dry-run"]
    assert main([*asked, "--gpus", "16", "--batch-size", "16"]) == 0
    assert "16 GPU ranks: pp=2 dp=8" in capsys.readouterr().out
    assert main([*asked, "--gpus", "24"]) == 2
    assert "gpus=24: the Ray cluster has 16 GPUs" in capsys.readouterr().err
    assert main([*asked, "--gpus", "3", "--pp-size", "3", "--backend", "cpu"]) == 0

    import ray

    connect(sixteen_gpus.address)
    try:
        scaling, cores = RayLauncher(16, "cuda").scaling()
        assert cores == 16, "the head has no rank"
        group = ray.util.placement_group([scaling.resources_per_worker] * 16, strategy=scaling.placement_strategy)
        ray.get(group.ready(), timeout=60)
        placed = Counter(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
        gpus = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")}
        assert placed == dict.fromkeys(gpus, 8)
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_nodes_that_come_late_are_waited_for(capsys):
    import ray
    from ray.cluster_utils import Cluster as Raylets

    raylets = Raylets(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        start_ray(address=raylets.address)
        with pytest.raises(UserError, match="larger cluster"):
            wait_for(2, 2, "cuda", 1.5)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(wait_for, 2, 2, "cuda", 120.0)
            raylets.add_node(num_cpus=1, num_gpus=2)  # in the main thread, which alone may set signals
            waiting.result()
        assert alive().gpus == 2
        assert capsys.readouterr().out.count("waiting up to") == 2
    finally:
        ray.shutdown()
        raylets.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a node with another folder under the same name needs a mount")
def test_a_folder_that_a_node_does_not_share_is_refused(tmp_path):
    import ray
    from ray.cluster_utils import Cluster as Raylets

    runs = tmp_path / "runs"
    runs.mkdir()
    raylets = Raylets(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = None
    try:
        start_ray(address=raylets.address)
        refuse_unshared(runs)  # one node
        start = f"{sys.executable} -m ray.scripts.scripts start --address {raylets.address} --num-cpus 1 --block"
        hidden = f"mount -t tmpfs none {runs} && exec {start}"
        node = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", hidden], stdout=subprocess.DEVNULL, start_new_session=True
        )
        until = time.monotonic() + 60
        while len(alive().nodes) < 2 and time.monotonic() < until:
            time.sleep(0.2)
        with pytest.raises(UserError, match="does not see what is written there"):
            refuse_unshared(runs)
        assert not list(runs.iterdir()), "the probe leaves nothing behind"
        refuse_unshared(Path(tmp_path))  # which both see
    finally:
        ray.shutdown()
        if node is not None:
            os.killpg(node.pid, 9)
        raylets.shutdown()

"""Ranks as Ray Train workers: one dies, a node is lost, and training goes on by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.errors import StageFailed
from ray_pipeline.launch.launchers import ProcessLauncher, RayLauncher
from ray_pipeline.launch.local_ray import start_ray
from ray_pipeline.launch.rank_errors import ERRORS
from ray_pipeline.records.progress import progress_text, read_progress
from tests.training.toy_run import arguments, train

pytestmark = pytest.mark.slow


@pytest.fixture
def one_ray() -> Iterator[None]:
    import ray

    start_ray(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


def test_a_worker_that_dies_ends_the_others_in_seconds(one_ray, tmp_path):
    job = arguments(tmp_path, layout={"dp_size": 2}, fault={"kind": "exit", "rank": 1, "step": 5})
    with pytest.raises(StageFailed) as caught:
        RayLauncher(2, "cpu", max_restarts=0).run("pretrain", train, job)
    struck = (Path(job["folder"]) / ERRORS / "status-1.json").stat().st_mtime
    assert time.time() - struck < 30
    assert "rank 1 (pp=0 dp=1 sp=0 tp=0): pretrain, step 6, next batch" in str(caught.value)


def test_a_worker_that_dies_once_is_restarted_and_the_weights_are_the_same(one_ray, tmp_path):
    unbroken = ProcessLauncher(2).run("pretrain", train, arguments(tmp_path / "a", layout={"dp_size": 2}))
    job = arguments(tmp_path / "b", layout={"dp_size": 2}, fault={"kind": "once", "rank": 0, "step": 5})
    restarted = RayLauncher(2, "cpu", max_restarts=1).run("pretrain", train, job)
    assert restarted["started"] in (2, 4), "the checkpoint of step 4 may have been on its way"
    assert restarted | {"started": 0} == unbroken


@pytest.fixture
def three_nodes() -> Iterator[tuple[Any, Any]]:
    """A Ray cluster of nodes with two CPUs, one and one; and the last node."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    last = cluster.add_node(num_cpus=1)
    start_ray(address=cluster.address)
    yield cluster, last
    ray.shutdown()
    cluster.shutdown()


def test_a_lost_node_leaves_fewer_replicas_that_go_on(three_nodes, tmp_path):
    """Three workers fit when a node is gone; with 8 rows a step two of them train and one is spare."""
    cluster, node = three_nodes
    settings: dict[str, Any] = {"steps": 40, "checkpoint_every": 2, "eval_every": 40}
    expected = ProcessLauncher(2).run("pretrain", train, arguments(tmp_path / "a", layout={"dp_size": 2}, **settings))
    job = arguments(tmp_path / "b", layout={"gpus": 4, "dp_size": 4}, pace=0.2, **settings)
    threading.Thread(target=lose_node, args=(Path(job["folder"]), cluster, node), daemon=True).start()
    figures = RayLauncher(4, "cpu", elastic=(4, 2)).run("pretrain", train, job)
    assert figures["world"] == 2
    assert 4 <= figures["started"] < 40
    assert abs(figures["validation_loss"] - expected["validation_loss"]) < 1e-4
    assert "(2 of 4 ranks left: dp=2)" in progress_text(read_progress(Path(job["folder"])) or {})


def lose_node(folder: Path, cluster: Any, node: Any) -> None:
    """Kill the node when the fourth step has a checkpoint."""
    while not list((folder / "checkpoints").glob("step_00000004")):
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)

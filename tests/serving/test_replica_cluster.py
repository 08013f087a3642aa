"""Replicas on a cluster that RAY_ADDRESS names: more of them while requests wait; the cluster outlives `serve`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.made_servers import UP_SECONDS, save_model, serving, start, verb_serving

pytestmark = pytest.mark.slow
pytest.importorskip("ray.serve")
pytest.importorskip("xllamacpp")

QUESTIONS = [f"What is {i} + {3 * i}?" for i in range(6)]
PROGRAM = [sys.executable, "-m", "ray_pipeline.cli"]


def answer(address: str, question: str) -> str:
    """Greedy; thinking and answer."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=UP_SECONDS)
    assert reply.status_code == 200, reply.text
    message = reply.json()["choices"][0]["message"]
    return f"{message.get('reasoning_content') or ''}|{message.get('content') or ''}"


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a cluster of two raylets with two CPUs each."""
    from ray.cluster_utils import Cluster

    raylets = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    raylets.add_node(num_cpus=2)
    yield raylets.address
    raylets.shutdown()


@pytest.fixture
def served(cluster: str, tmp_path: Path) -> Iterator[tuple[str, psutil.Process, Path]]:
    """`serve --replicas 1:2` of llamacpp on that cluster: its address, its process, the model."""
    folder = save_model(tmp_path / "hf")
    words = ("--engine", "llamacpp", "--replicas", "1:2", "--slots", "1", "--threads", "1")
    environment = os.environ | {"RAY_ADDRESS": cluster, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "c")}
    with verb_serving(folder, *words, environment=environment) as (address, pid):
        yield address, psutil.Process(pid), folder


def running(address: str) -> int:
    return int(httpx.get(f"{address}/health", timeout=60).json()["replicas"])


def applications(cluster: str) -> list[str]:
    """Of Ray Serve on the cluster, by another program."""
    script = f"import ray; ray.init({cluster!r}); from ray import serve; print('|'.join(serve.status().applications))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=UP_SECONDS)
    return [name for name in done.stdout.strip().splitlines()[-1:] if name]


def test_requests_that_wait_bring_a_second_replica_and_the_cluster_outlives_serve(served, cluster):
    address, process, folder = served
    assert running(address) == 1
    with serving(start(folder, "llamacpp")) as alone:
        expected = [answer(alone, question) for question in QUESTIONS]
    assert [answer(address, question) for question in QUESTIONS] == expected

    until, busiest = time.monotonic() + UP_SECONDS, 1
    with ThreadPoolExecutor(12) as pool:
        while busiest < 2 and time.monotonic() < until:
            said = list(pool.map(lambda i: answer(address, QUESTIONS[i % 6]), range(48)))
            assert said == [expected[i % 6] for i in range(48)]
            busiest = running(address)
    assert busiest == 2
    assert len(applications(cluster)) == 1

    process.send_signal(signal.SIGINT)
    process.wait(UP_SECONDS)
    assert not applications(cluster)

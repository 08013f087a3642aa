"""Replicas of an engine: the door in front of them without Ray, and Ray Serve itself with the verb."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from click.testing import CliRunner

from ray_pipeline.cli.serve import serve
from ray_pipeline.cli.served_model import find_served
from ray_pipeline.errors import UserError
from ray_pipeline.launch.cluster import Cluster, Node
from ray_pipeline.serving.engines import EngineSettings, RunningEngine
from ray_pipeline.serving.guard import Message
from ray_pipeline.serving.ray_replicas import ReplicaCount, share
from ray_pipeline.serving.replica import EngineReplica, ForwardedRequest
from ray_pipeline.serving.replica_door import ReplicaLost, TooMany, replica_app
from tests.serving.made_servers import UP_SECONDS, save_model, serving, start, verb_serving

QUESTIONS = [f"What is {i} + {3 * i}?" for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "hf")


def answer(address: str, question: str, *, stream: bool) -> str:
    """Thinking and answer, greedy."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    message = {"role": "user", "content": question}
    reply = client.chat.completions.create(model="hf", messages=[message], temperature=0, max_tokens=24, stream=stream)
    said = [choice.delta for chunk in reply for choice in chunk.choices] if stream else [reply.choices[0].message]
    return "|".join("".join(getattr(one, f, None) or "" for one in said) for f in ("reasoning_content", "content"))


@pytest.fixture(scope="module")
def alone(folder) -> list[str]:
    """The native engine's own answers, one after the other."""
    with serving(start(folder, "native")) as address:
        return [answer(address, question, stream=False) for question in QUESTIONS]


class OneReplica:
    """A replica in this process; `faults` come before answers, one each."""

    def __init__(self, replica: EngineReplica):
        self.replica, self.faults = replica, list[Exception]()

    async def ask(self, request: ForwardedRequest) -> AsyncIterator[list[Message]]:
        fault = self.faults.pop() if self.faults else None
        if isinstance(fault, TooMany):
            raise fault
        async for messages in self.replica.answer(request):
            if fault is not None and messages[0]["type"] == "http.response.body":
                raise fault
            yield messages

    def running(self) -> int:
        return 1


@pytest.fixture
def one(folder) -> Iterator[tuple[OneReplica, str]]:
    replicas = OneReplica(EngineReplica("native", find_served(str(folder), folder), EngineSettings(slots=4)))
    with serving(RunningEngine("native", replica_app(replicas, "native"), lambda: None)) as address:
        yield replicas, address


def test_the_door_passes_answers_streams_and_refusals_unchanged(one, alone):
    _, address = one
    for question, expected in zip(QUESTIONS, alone, strict=True):
        assert answer(address, question, stream=False) == answer(address, question, stream=True) == expected
    assert "<title>" in httpx.get(f"{address}/").text
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "engine": "native", "replicas": 1}
    assert [model["id"] for model in httpx.get(f"{address}/v1/models").json()["data"]] == ["hf"]
    wrong = httpx.post(f"{address}/v1/chat/completions", json={"messages": [], "temprature": 1})
    assert wrong.status_code == 400 and wrong.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{address}/nothing").status_code == 404
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405


def test_a_client_that_leaves_frees_its_slot(one):
    replicas, address = one
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 110, "stream": True, "logit_bias": None}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as reply:
        next(reply.iter_bytes())
    writer = replicas.replica._running.stop.__self__
    for _ in range(100):
        if writer.load == (0, 0):
            break
        time.sleep(0.1)
    assert writer.load == (0, 0)


def test_too_many_requests_and_lost_replicas_are_told_in_openais_form(one):
    replicas, address = one
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    replicas.faults = [TooMany()]
    refused = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    replicas.faults = [ReplicaLost()]
    stream = httpx.post(f"{address}/v1/chat/completions", json=body | {"stream": True})
    assert "try again" in stream.text and stream.text.startswith("data: ") and "server_error" in stream.text


def test_replicas_share_the_cores_and_take_a_gpu_each():
    cpus = Cluster((Node("a", 4, 0, 0), Node("b", 2, 0, 0)))
    assert share("native", EngineSettings(), ReplicaCount(2, 2), cpus)[1] == {"num_cpus": 2}
    assert share("native", EngineSettings(), ReplicaCount(1, 6), cpus)[0].threads == 1
    with pytest.raises(UserError, match="--replicas 3: with 3 CPU threads each 1 of them fit"):
        share("native", EngineSettings(threads=3), ReplicaCount(3, 3), cpus)
    gpus = Cluster((Node("a", 8, 2, 0),))
    assert share("vllm", EngineSettings(), ReplicaCount(2, 4), gpus)[1] == {"num_cpus": 1, "num_gpus": 1}
    with pytest.raises(UserError, match="each takes a GPU, and the Ray cluster has 2 GPUs"):
        share("native", EngineSettings(), ReplicaCount(3, 3), gpus)


@pytest.mark.parametrize("given", ["0", "x", "3:2", "1:", "-1", "1:2:3", "9999999"])
def test_what_is_no_number_of_replicas_is_refused(given):
    result = CliRunner().invoke(serve, ["model", "--replicas", given])
    assert result.exit_code == 2 and "Give one, as 2, or a range, as 1:4" in result.output


def test_a_machine_without_the_files_is_named(folder, tmp_path):
    served = find_served(str(folder), tmp_path)
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        with pytest.raises(UserError, match="all nodes of the cluster share"):
            EngineReplica("native", served, EngineSettings())
    finally:
        moved.rename(folder)


@pytest.fixture(scope="module")
def verb(folder) -> Iterator[tuple[str, psutil.Process]]:
    """`serve --replicas 2` in a process of its own: its address, and the process."""
    pytest.importorskip("ray.serve")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    words = ("--engine", "native", "--replicas", "2", "--slots", "4")
    with verb_serving(folder, *words, environment=environment) as (address, pid):
        running = psutil.Process(pid)
        yield address, running
        for child in running.children(recursive=True) if running.is_running() else []:
            child.kill()


def replica_processes(process: psutil.Process) -> list[psutil.Process]:
    return [p for p in process.children(recursive=True) if "ServeReplica" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_ray_serve_answers_as_one_engine_replaces_a_killed_replica_and_ends_with_ctrl_c(verb, alone):
    address, process = verb
    assert httpx.get(f"{address}/health", timeout=60).json() == {"status": "ok", "engine": "native", "replicas": 2}
    with ThreadPoolExecutor(16) as pool:
        said = list(pool.map(lambda i: answer(address, QUESTIONS[i % 8], stream=i % 2 == 0), range(32)))
    assert said == [alone[i % 8] for i in range(32)]

    before = replica_processes(process)
    assert len(before) == 2
    before[0].kill()
    assert [answer(address, question, stream=False) for question in QUESTIONS] == alone, "the other one answers"
    until = time.monotonic() + UP_SECONDS
    while time.monotonic() < until:
        now = {one.pid for one in replica_processes(process)}
        # Ray Serve counts the killed one as running until it has looked.
        if (
            len(now) == 2
            and before[0].pid not in now
            and httpx.get(f"{address}/health", timeout=60).json()["replicas"] == 2
        ):
            break
        time.sleep(0.5)
    assert len(now) == 2 and before[1].pid in now and before[0].pid not in now
    assert [answer(address, question, stream=True) for question in QUESTIONS] == alone

    family = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=UP_SECONDS)
    assert not alive, [" ".join(one.cmdline())[:80] for one in alive]

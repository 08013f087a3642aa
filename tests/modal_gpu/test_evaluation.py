"""`eval --backend modal`: what is asked for, and what is refused; test_real_runs has one that really answers."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from modal_proto import api_pb2 as pb

from modal_gpu.job import State
from modal_gpu.run_registry import Registry
from ray_pipeline.cli import main
from ray_pipeline.dag.ledger import RunFile
from ray_pipeline.settings.loading import config_yaml, load_config
from tests.modal_gpu.world import World, succeeded

ASK = ["eval", "toy", "--backend", "modal"]


@pytest.fixture
def launched(world: World) -> World:
    """A run `toy` that was launched, without any file on the volume yet; what is called refuses."""
    world.volume("deepseek-runs").mkdir(parents=True)
    Registry().write(State("toy", "fc-9", "ap-9", "deepseek-runs", "3 x H100", "me@there", time.time()))
    world.start = lambda world, call: world.finish(call, *succeeded({"refused": "--stage sft: is not finished"}))
    return world


def began(world: World) -> None:
    folder = world.volume("deepseek-runs") / "toy"
    RunFile(folder).save()
    config = load_config(None, {"backend": "modal", "run_name": "toy", "modal.timeout_seconds": 600})
    (folder / "config.yaml").write_text(config_yaml(config))


def test_a_container_without_gpus_answers_beside_the_files(launched: World, capsys: pytest.CaptureFixture) -> None:
    began(launched)
    assert main([*ASK, "--stage", "sft"]) == 2
    assert "on Modal: --stage sft: is not finished" in capsys.readouterr().err
    made = launched.created()["evaluate"].function
    assert made.resources.gpu_config.count == 0 and made.resources.milli_cpu == 8000 and made.timeout_secs == 600
    assert [mount.mount_path for mount in made.volume_mounts] == ["/runs", "/root/.cache/huggingface"]
    assert [launched.secrets[key] for key in made.secret_ids] == [{"WANDB_API_KEY": "0" * 40}]
    (app,) = [request for request in launched.apps.values() if request.description == "ray-pipeline"]
    assert app.app_state == pb.APP_STATE_EPHEMERAL, "it ends with this program"
    assert main([*ASK, "--no-tracking"]) == 2
    assert list(launched.created()["evaluate"].function.secret_ids) == []


def test_ctrl_c_ends_it_there(launched: World) -> None:
    began(launched)
    launched.start = lambda *_: threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert main(ASK) == 130
    assert launched.requests(pb.AppClientDisconnectRequest), "with which Modal ends the app and its containers"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (ASK, "run toy: nothing of it is on its volume yet"),
        (["eval", "tox", "--backend", "modal"], 'did you mean "toy"'),
        ([*ASK, "--samples", "2", "--temperature", "0"], "greedy answers to a question are all the same"),
        ([*ASK, "--difficulty", "7"], "must be a level from 1 to 5"),
        ([*ASK, "--compare", "there.json"], "there.json"),
    ],
)
def test_what_cannot_be_asked_rents_nothing(
    launched: World, words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("{}")
    assert main(words) == 2
    assert text in capsys.readouterr().err.replace("\n", " ")
    assert not launched.requests(pb.FunctionCreateRequest)

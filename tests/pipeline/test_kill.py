"""kill -9 at a random moment of every stage; resumed, the run ends with the weights of an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import time

import psutil
import pytest

from ray_pipeline.settings.chain import chain
from ray_pipeline.settings.schema import PipelineFields
from tests.pipeline.driving import TOY, digests, finish, kill, start, wait_until_stage_works

RUN = ("run", "--config", str(TOY), "--run-name", "toy", "--gpus", "2", "--pp-size", "2", "--no-wandb")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start(*RUN, folder=folder), folder)
    return digests(folder, "toy")


@pytest.mark.parametrize("stage", chain(PipelineFields()))
def test_driver_killed_in_any_stage(unbroken, tmp_path, stage):
    process = start(*RUN, folder=tmp_path)
    wait_until_stage_works(process, tmp_path, "toy", stage, step=0)
    time.sleep(random.uniform(0, 12))
    if process.poll() is None:
        kill(process)
    finish(start("resume", "toy", folder=tmp_path), tmp_path)
    assert digests(tmp_path, "toy") == unbroken


@pytest.mark.parametrize("victim", ["ray::RayTrainWorker", "raylet"])
def test_worker_or_ray_killed(unbroken, tmp_path, victim):
    process = start(*RUN, folder=tmp_path)
    wait_until_stage_works(process, tmp_path, "toy", "grpo", step=3)
    family = psutil.Process(process.pid).children(recursive=True)
    found = [p for p in family if any(victim in part for part in p.cmdline()[:1])]
    assert found, [p.cmdline()[:1] for p in family]
    os.kill(found[0].pid, signal.SIGKILL)
    process.wait(timeout=300)  # restarted by itself where a worker died; an error where Ray did
    finish(start("resume", "toy", folder=tmp_path), tmp_path)
    assert digests(tmp_path, "toy") == unbroken

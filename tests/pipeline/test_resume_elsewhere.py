"""The real command line goes on in another layout, and out of a damaged checkpoint by the commands it prints."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ray_pipeline.launch.launchers import prepare_folder
from tests.pipeline.driving import TOY, digests, finish, kill, stages, start, wait_until_stage_works

RUN = ("run", "--config", str(TOY), "--run-name", "toy", "--until", "pretrain", "--no-wandb", "--gpus", "2")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start(*RUN, "--pp-size", "2", folder=folder), folder)
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run that was killed behind two checkpoints of PRETRAIN."""
    folder = tmp_path_factory.mktemp("interrupted")
    process = start(*RUN, "--pp-size", "2", folder=folder)
    wait_until_stage_works(process, folder, "toy", "pretrain", step=12)
    while len(checkpoints(folder)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    kill(process)
    prepare_folder(checkpoints(folder)[0].parents[1])  # waits until its workers are gone too
    return folder


@pytest.fixture
def broken(interrupted, tmp_path) -> Path:
    shutil.copytree(interrupted, tmp_path / "runs")
    return tmp_path / "runs"


def checkpoints(folder: Path) -> list[Path]:
    (found,) = (folder / "toy").glob("pretrain-*/checkpoints")
    return sorted(found.glob("step_*"))


@pytest.mark.parametrize(
    "layout", [("--gpus", "2", "--pp-size", "1", "--dp-size", "2"), ("--gpus", "1"), ("--gpus", "2", "--tp-size", "2")]
)
def test_a_run_goes_on_in_another_layout(unbroken, broken, layout):
    assert len(checkpoints(broken)) >= 2
    finish(start("resume", "toy", "--until", "pretrain", *layout, folder=broken), broken)
    before, after = stages(unbroken, "toy")["pretrain"], stages(broken, "toy")["pretrain"]
    assert "unfinished: checkpoint at step" in (broken / "output.log").read_text()
    assert after["folder"].rpartition("/")[2] == before["folder"].rpartition("/")[2], "the same stage"
    assert abs(after["metrics"]["validation_loss"] - before["metrics"]["validation_loss"]) < 1e-4


def test_a_damaged_checkpoint_is_left_by_the_commands_that_are_printed(unbroken, broken):
    victim = next(checkpoints(broken)[-1].glob("__0_*"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    process = start("resume", "toy", "--until", "pretrain", folder=broken)
    assert process.wait(300) == 2
    said = (broken / "output.log").read_text()
    assert f"{victim}: damaged: its SHA-256" in said.replace("\n", " ")
    assert f"The checkpoint of step {int(checkpoints(broken)[-2].name[5:])} is whole" in said
    move, resume = [line.strip() for line in said.splitlines() if line.startswith(("  mv ", "  python -m "))]
    subprocess.run(move, shell=True, check=True)
    assert resume == f"python -m ray_pipeline.cli resume toy --output-dir {broken}"
    finish(start("resume", "toy", "--until", "pretrain", folder=broken), broken)
    assert digests(broken, "toy") == digests(unbroken, "toy")

"""kill -9 of the driver while its ranks train: resume ends where a run without the kill would have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_pipeline.dag.ledger import read_status
from ray_pipeline.launch.launchers import prepare_folder
from tests.dag import toy_stages as toy

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds: starting Ray and its ranks takes half a minute on an idle machine of two cores


def start(folder: Path, verb: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.dag.driver", str(folder), "2", verb]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pretrain(folder: Path) -> dict:
    return read_status(folder / "toy")["stages"][1]


def wait_for_ranks(folder: Path, driver: subprocess.Popen) -> None:
    """Until both wait behind a checkpoint, and will not go on when the driver is dead."""
    deadline = time.monotonic() + PATIENCE
    while len(list((folder / "toy").glob("rank-*-waits"))) < 2:
        assert driver.poll() is None, driver.communicate()[0]
        if time.monotonic() > deadline:
            driver.kill()
            raise AssertionError(f"ranks do not wait within {PATIENCE} s:\n{driver.communicate()[0]}")
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_driver_killed_in_pretrain_resumes_from_its_checkpoint_to_the_same_result(tmp_path, number):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "slow").write_text("")
    driver = start(tmp_path, "run")
    wait_for_ranks(tmp_path, driver)
    driver.send_signal(number)
    since = time.monotonic()
    said = driver.communicate(timeout=PATIENCE)[0]
    if number == signal.SIGTERM:
        assert driver.returncode == 143, said
        assert said.splitlines()[-1].endswith(f"resume toy --output-dir {tmp_path}"), said
        assert "***" not in said and "Traceback" not in said, said
        assert time.monotonic() - since < 30, "on an idle machine it takes two seconds"
        [folder] = (tmp_path / "toy").glob("pretrain-*")
        prepare_folder(folder, wait=10)  # raises while a worker lives
    before = pretrain(tmp_path)
    assert before["status"] == "interrupted"

    (tmp_path / "toy" / "slow").unlink()
    driver = start(tmp_path, "resume")
    said = driver.communicate(timeout=PATIENCE)[0]
    assert driver.returncode == 0, said
    assert "unfinished: checkpoint at step" in said
    after = pretrain(tmp_path)
    value = 7
    for step in range(toy.STEPS):
        value = (value * 31 + step + 1) % 1_000_003
    assert after["metrics"]["validation_loss"] == value / 1_000_003
    assert after["metrics"]["started_at"] == 4.0
    assert (after["status"], after["attempt"], after["wandb_id"]) == ("done", 2, before["wandb_id"])
    assert toy.calls(tmp_path / "toy") == ["data_prep"], "a finished stage was not run again"
    assert os.path.exists(tmp_path / "toy" / "report.html")

"""What trackers have of a stage after kills and resumes, and that none of them disturbs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.records.guard_file import add_intervention
from ray_pipeline.records.metrics_file import MetricsFile, read_metrics
from ray_pipeline.records.trackers.follower import Follower
from ray_pipeline.records.trackers.tracker import Ending, TrackedRun
from ray_pipeline.records.trackers.tracking import KNOWN, Tracking
from ray_pipeline.settings.schema import TrackingConfig
from tests.records.trackers.history import HISTORIES, ROOT, in_namespace, session, session_in, wandb_records


def run_in(folder: Path) -> TrackedRun:
    return TrackedRun(folder, "sft", "run-1-sft-abc", "abc123", "run-1", "tests", None, {})


def three_resumes(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    session(folder, name, 0, 1, 3, kill=True)
    session(folder, name, 2, 3, 5, kill=True)
    session(folder, name, 4, 5, 5, kill=True)
    session(folder, name, 5, 6, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KNOWN))
def test_a_run_resumed_three_times_has_one_continuous_history(tmp_path, name):
    pytest.importorskip(KNOWN[name].package)
    folder = tmp_path / "runs" / "run-1" / "sft-abc"
    three_resumes(folder, name)
    assert HISTORIES[name](folder) == {"train/loss": [*range(1, 9)], "val/accuracy": [*range(1, 9)]}


@pytest.mark.slow
def test_wandb_has_the_run_by_its_names_with_settings_and_verdict(tmp_path):
    session(tmp_path, "wandb", 0, 1, 2)
    records = wandb_records(tmp_path)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert (run["run_id"], run["run_group"], run["job_type"], run["display_name"]) == (
        "abc123", "run-1", "sft", "run-1-sft-abc"
    )  # fmt: skip
    assert "c0" in str(run["config"])
    told = str([record for record in records if record["type"] == "summary"])
    assert all(word in told for word in ("LEARNED NOTHING", "not better", "params", "exit_code", "cost/run_usd"))
    (made,) = [record["artifact"] for record in records if record["type"] == "artifact" and "run-1" in str(record)]
    assert (made["name"], made["type"], made["aliases"]) == ("run-1-sft-model", "model", ["latest", "e5e5e5e5e5e5"])
    assert "d1d1d1" in made["metadata"] and (tmp_path / "model").as_uri() in str(made["manifest"]), "by reference"
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("val/samples*.table.json")]
    assert [table["data"][0][:4] for table in tables] == [["2 + 2", "5", "4", False]]
    assert "LEARNED NOTHING" in str([record for record in records if record["type"] == "alert"])


@pytest.mark.slow
def test_wandb_that_cannot_be_reached_is_told_and_loses_no_line_of_the_file(tmp_path):
    with pytest.raises(AssertionError, match=r"Weights & Biases stopped|did not reach"):
        session(tmp_path, "wandb", 0, 1, 3, WANDB_MODE="online", WANDB_API_KEY="x", WANDB_BASE_URL="http://127.0.0.1:9")


FULL = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "../../mlruns", "trackio": "trackio"}  # its folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list(KNOWN))
def test_a_disk_that_is_full_for_a_tracker_costs_training_nothing(tmp_path, name):
    pytest.importorskip(KNOWN[name].package)
    folder = tmp_path / "runs" / "run-1" / "sft-abc"
    place = (folder / FULL[name]).resolve()
    place.mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    inside = [*in_namespace(), "sh", "-c", f'mount -t tmpfs -o size=4k tmpfs {place} && exec "$@"', "sh"]
    done = session_in(folder, name, 0, 1, 3, before=inside)
    if "mount: " in done.stderr and not (folder / "metrics.jsonl").exists():
        pytest.skip("needs unshare and mount")
    assert [line["step"] for line in read_metrics(folder)] == [1, 1, 2, 2, 3, 3], done.stderr
    if done.returncode:  # of the last line alone, which asks whether the tracker failed
        assert "No space left" in done.stderr and "training goes on" in done.stderr


class Fake:
    """A tracker that keeps what it is sent; raises or hangs where it is told to."""

    title = "Fake"

    def __init__(self, has: dict[str, int] | None = None, *, fails_at: int | None = None, hangs: bool = False):
        self.has, self.fails_at, self.hangs, self.rows, self.ends, self.alerts = has or {}, fails_at, hangs, [], [], []

    def open(self, run: TrackedRun) -> dict[str, int]:
        if self.hangs:
            threading.Event().wait()
        return self.has

    def log(self, step: int, kind: str, figures: dict[str, Any]) -> None:
        if step == self.fails_at:
            raise ConnectionError("gone")
        self.rows.append((step, kind, figures))

    def samples(self, step: int, rows: Any) -> None: ...

    def alert(self, step: int, title: str, text: str) -> None:
        self.alerts.append((step, title))

    def finish(self, ending: Ending) -> None:
        self.ends.append(ending.verdict)


def followed(folder: Path, tracker: Fake) -> Tracking:
    tracking = Tracking(TrackingConfig(wandb=False), run_in(folder))
    tracking.followers = [Follower(lambda: tracker, "Fake", tracking.run)]
    return tracking.start()


def log_steps(folder: Path, *steps: int, resume: int = 0) -> None:
    lines = MetricsFile(folder, "sft", resume_step=resume)
    for step in steps:
        lines.log(step, {"train/loss": 1.0})
        lines.log(step, {"val/accuracy": 0.5})
    lines.close()


def test_what_a_tracker_has_is_not_sent_again_by_kind(tmp_path):
    tracker = Fake({"train": 4, "val": 2})
    tracking = followed(tmp_path, tracker)
    log_steps(tmp_path, 2, 4, 6)
    tracking.finish(Ending("DONE", 0))
    assert [(step, kind) for step, kind, _ in tracker.rows] == [(4, "val"), (6, "train"), (6, "val")]
    assert tracker.rows[1][2] == {"train/loss": 1.0} and tracker.ends == ["DONE"] and tracker.alerts == []


def test_steps_that_are_taken_again_are_not_repeated(tmp_path):
    tracker = Fake()
    tracking = followed(tmp_path, tracker)
    log_steps(tmp_path, 1, 2, 3)
    while len(tracker.rows) < 6:
        time.sleep(0.01)
    log_steps(tmp_path, 2, 3, 4, resume=1)
    tracking.finish(Ending("DONE", 0))
    assert [step for step, kind, _ in tracker.rows if kind == "train"] == [1, 2, 3, 4]


def test_a_tracker_that_fails_is_told_with_what_it_lacks_and_raises_nothing(tmp_path, caplog):
    tracking = followed(tmp_path, Fake(fails_at=2))
    log_steps(tmp_path, 1, 2, 3)
    tracking.finish(Ending("DONE", 0))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "Fake stopped (ConnectionError: gone); training goes on" in said[0]
    assert "4 lines of figures did not reach Fake; they are in metrics.jsonl" in said[1]


def test_a_tracker_that_hangs_is_left_behind(tmp_path, caplog):
    tracking = followed(tmp_path, Fake(hangs=True))
    log_steps(tmp_path, 1)
    began = time.monotonic()
    tracking.finish(Ending("DONE", 0), seconds=0.2)
    assert time.monotonic() - began < 5
    assert "2 lines of figures did not reach Fake within 0 s" in caplog.text


def test_what_guards_did_is_an_alert(tmp_path):
    tracker = Fake()
    tracking = followed(tmp_path, tracker)
    add_intervention(tmp_path, step=7, guard="loss spike", policy="warn", text="it rose", skipped=[], back_to=None)
    tracking.finish(Ending("DONE", 0))
    assert tracker.alerts == [(7, "loss spike")]


def test_what_the_run_has_cost_is_told_now_and_then_and_not_of_an_earlier_attempt(tmp_path):
    log_steps(tmp_path, 1)
    tracker, run = Fake(), run_in(tmp_path)
    tracking = Tracking(TrackingConfig(wandb=False), replace(run, spent=lambda: 0.5))
    time.sleep(0.01)
    tracking.followers = [Follower(lambda: tracker, "Fake", tracking.run)]
    log_steps(tmp_path, 2, 3, resume=1)
    tracking.start()
    tracking.finish(Ending("FAILED", 1, "boom"))
    assert [figures.get("cost/run_usd") for _, _, figures in tracker.rows] == [None, None, 0.5, None, None, None]
    assert tracker.alerts == [(3, "FAILED")]


DYING = """
import os, psutil, sys, time
from pathlib import Path
from ray_pipeline.records.metrics_file import MetricsFile, read_metrics
from ray_pipeline.records.trackers.tracker import Ending, TrackedRun
from ray_pipeline.records.trackers.tracking import Tracking
from ray_pipeline.settings.schema import TrackingConfig

folder = Path(sys.argv[1])
run = TrackedRun(folder, "sft", "run-1-sft-abc", "abc123", "run-1", "tests", None, {})
tracking = Tracking(TrackingConfig(), run).start()
lines = MetricsFile(folder, "sft")
lines.log(1, {"train/loss": 1.0})
(follower,) = tracking.followers
while follower.sent is None or follower.sent["train"] < 1:
    time.sleep(0.05)
for child in psutil.Process().children(recursive=True):
    child.kill()
    child.wait()
for step in (2, 3):
    lines.log(step, {"train/loss": 1.0})
tracking.finish(Ending("DONE", 0), seconds=60)
assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]
os._exit(0)  # W&B's own words at the end of a process are not ours
"""


@pytest.mark.slow
def test_a_tracker_whose_process_is_killed_changes_nothing_in_training(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path)], env=os.environ | {"WANDB_MODE": "offline"}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Weights & Biases stopped" in done.stderr or "did not reach Weights & Biases" in done.stderr

"""metrics.jsonl and W&B over a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.progress import Progress
from ray_pipeline.records.trackers import EVALUATED, Tracker, can_log_in, damaged_files, read_metrics, read_samples
from ray_pipeline.settings.schema import PipelineFields, TrackingConfig

QUIET = PipelineFields(tracking=TrackingConfig(wandb=False))


def tracker(folder: Path, resume_step: int = 0, config: PipelineFields = QUIET) -> Tracker:
    return Tracker(folder, "sft", config, wandb_id="abc123", group="run-1", resume_step=resume_step)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_lines_name_stage_step_and_figures(tmp_path):
    log = tracker(tmp_path)
    log.log(5, {"train/loss": 1.5})
    log.finish({})
    (line,) = read_metrics(tmp_path)
    assert (line["stage"], line["step"], line["train/loss"]) == ("sft", 5, 1.5)


def test_resume_drops_lines_past_the_checkpoint(tmp_path):
    first = tracker(tmp_path)
    for step in range(1, 8):
        first.log(step, {"x": float(step)})
    second = tracker(tmp_path, resume_step=4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    second.log(5, {"x": 5.0})
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_resume_without_a_checkpoint_starts_the_file_again(tmp_path):
    tracker(tmp_path).log(3, {"x": 1.0})
    tracker(tmp_path, resume_step=0)
    assert steps(tmp_path) == []


def test_line_torn_by_a_kill_is_dropped(tmp_path):
    tracker(tmp_path).log(1, {"x": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "st')
    log = tracker(tmp_path, resume_step=1)
    log.log(2, {"x": 2.0})
    assert steps(tmp_path) == [1, 2]


SESSION = """
import os, sys
from pathlib import Path
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.records.trackers import Tracker
folder, resume, first, last, kill = Path(sys.argv[1]), *map(int, sys.argv[2:])
log = Tracker(folder, "sft", PipelineFields(), wandb_id="abc123", group="run-1", resume_step=resume)
for step in range(first, last + 1):
    log.log(step, {"train/loss": 1.0 / step})
    log.log(step, {"eval/accuracy": step / 10})
if kill:
    os.kill(os.getpid(), 9)
log.finish({"accuracy": 1.0})
"""


def session(folder: Path, resume: int, first: int, last: int, *, kill: bool = False, **env: str) -> str:
    """One life of a rank-0 process that tracks; its stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(folder), *map(str, (resume, first, last, int(kill)))],
        env=clean | env, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (-9 if kill else 0), done.stderr
    return done.stderr


def wandb_records(folder: Path) -> list[dict]:
    """Every record of the offline run files below `folder`, oldest file first."""
    out = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        out += [json.loads(line) for line in text.splitlines() if line.strip()]
    return out


def test_wandb_keeps_id_and_monotone_steps_over_kill_and_resume(tmp_path):
    session(tmp_path, 0, 1, 5, kill=True)
    session(tmp_path, 3, 4, 7)  # the checkpoint was at step 3
    records = wandb_records(tmp_path)
    runs = [record["run"] for record in records if record["type"] == "run"]
    assert {(run["run_id"], run["run_group"], run["job_type"]) for run in runs} == {("abc123", "run-1", "sft")}
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    logged = [row["step"] for row in history]
    assert logged == sorted(logged)
    assert [row["step"] for row in history if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert steps(tmp_path) == [step for step in range(1, 8) for _ in range(2)]


def test_wandb_that_fails_is_told_once_and_training_goes_on(tmp_path):
    said = session(tmp_path, 0, 1, 3, WANDB_API_KEY="not-a-key", WANDB_BASE_URL="http://127.0.0.1:9")
    assert said.count("Weights & Biases stopped") == 1
    assert steps(tmp_path) == [1, 1, 2, 2, 3, 3]


DYING = """
import os, psutil, sys
from pathlib import Path
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.records.trackers import Tracker
log = Tracker(Path(sys.argv[1]), "sft", PipelineFields(), wandb_id="abc123", group="run-1")
log.log(1, {"x": 1.0})
for child in psutil.Process().children(recursive=True):
    child.kill()
    child.wait()
for step in (2, 3):
    log.log(step, {"x": 1.0})
log.finish({"x": 1.0})
os._exit(0)  # W&B's own words at the end of a process are not ours
"""


def test_wandbs_process_that_dies_is_told_once_and_training_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path)], env=os.environ | {"WANDB_MODE": "offline"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Weights & Biases stopped") == 1 and steps(tmp_path) == [1, 2, 3]


def test_a_key_that_wandb_login_left_counts_as_one_in_the_environment(tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    assert can_log_in({"NETRC": str(netrc)}, tmp_path)
    assert not can_log_in({"NETRC": str(netrc), "WANDB_BASE_URL": "https://wandb.example.org"}, tmp_path)
    assert can_log_in({"WANDB_API_KEY": "0123"}, tmp_path)
    assert not can_log_in({}, tmp_path)
    (tmp_path / ".netrc").write_text(netrc.read_text())
    assert can_log_in({}, tmp_path)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  passwor")
    assert not can_log_in({}, tmp_path)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_damaged_line_is_left_out_named_and_refused_on_resume(tmp_path, place):
    log = tracker(tmp_path)
    for step in (1, 2, 3):
        log.log(step, {"train/loss": 1.5})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    line = bytearray(lines[1])
    line[int(place * len(line))] ^= 1
    path.write_bytes(b"\n".join([lines[0], bytes(line), *lines[2:]]))
    assert steps(tmp_path) == [1, 3]
    assert damaged_files(tmp_path) == [f"{path}: damaged in line 2, left out"]
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged in line 2\. Delete that line \(sed -i 2d "):
        tracker(tmp_path, resume_step=3)


def test_damaged_samples_and_progress_are_named(tmp_path):
    write_sealed(tmp_path / "samples.json", {"samples": [{"prompt": "2+2?"}]})
    Progress(tmp_path, "sft", 3)
    assert damaged_files(tmp_path) == [] and read_samples(tmp_path) == [{"prompt": "2+2?"}]
    for name in ("samples.json", "progress.json"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes().replace(b"s", b"q", 1))
    found = damaged_files(tmp_path)
    assert len(found) == 2 and "samples.json: damaged" in found[0] and "progress.json: damaged" in found[1]


def test_an_evaluation_that_is_taken_again_is_logged_once(tmp_path):
    first = tracker(tmp_path)
    for step in (2, 4):
        first.log(step, {"train/loss": 1.0})
        first.log(step, {"eval/accuracy": 0.5})
    again = Tracker(tmp_path, "sft", QUIET, wandb_id="abc123", group="run-1", resume_step=4, evaluated=False)
    assert [(line["step"], "eval/accuracy" in line) for line in read_metrics(tmp_path)] == [
        (2, False), (2, True), (4, False)
    ]  # fmt: skip
    again.log(4, {"eval/accuracy": 0.5})
    assert steps(tmp_path) == [2, 2, 4, 4]


def test_wandb_that_had_a_step_but_not_its_evaluation_is_sent_it(tmp_path):
    class Run:
        def __init__(self) -> None:
            self.rows: list[dict] = []

        def log(self, row: dict) -> None:
            self.rows.append(row)

    log = tracker(tmp_path)
    log._run, log._received = Run(), {"step": 4, EVALUATED: 2}
    for step in (2, 4, 6):
        log.log(step, {"train/loss": 1.0})
        log.log(step, {"eval/accuracy": 0.5})
    found = [(row["step"], EVALUATED in row) for row in log._run.rows]
    assert found == [(4, True), (6, False), (6, True)]

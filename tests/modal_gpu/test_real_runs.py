"""Runs whose containers really work, as processes with CPU ranks: taken away in each stage, fetched, resumed."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from modal_proto import api_pb2 as pb

from modal_gpu import gpus
from modal_gpu.run_registry import Registry
from ray_pipeline.cli import main
from ray_pipeline.dag.ledger import read_record, read_status
from ray_pipeline.evaluation.outcome import read_report
from ray_pipeline.records.metrics_file import read_metrics
from ray_pipeline.settings.run_folder import CHECKPOINTS
from ray_pipeline.settings.schema import TRAINING_STAGES
from tests.modal_gpu.containers import Containers, Task
from tests.modal_gpu.world import World
from tests.pipeline.driving import finish, start

pytestmark = pytest.mark.slow

STAGES = ("data_prep", "pretrain", "sft", "grpo", "distillation", "export")
STEPS = {"pretrain": 40, "sft": 40, "distillation": 40, "grpo": 6}
SMALL = ["--config", "smoke", "--skip", "dpo", "--no-wandb"]
for _stage, _steps in STEPS.items():
    SMALL += ["--set", f"{_stage}.steps={_steps}", "--set", f"{_stage}.eval_every={_steps}"]
    SMALL += ["--set", f"{_stage}.checkpoint_every={1 if _stage == 'grpo' else 4}"]


class TakesAway:
    """Takes one container away in each stage: from training once a checkpoint of it is on the volume."""

    def __init__(self, world: World):
        self.world, self.taken = world, set[str]()

    def __call__(self, task: Task) -> None:
        if "deepseek-runs" not in task.views or task.preempted:
            return
        for stage in STAGES:
            if stage not in self.taken and self._is_at(task, stage):
                self.taken.add(stage)
                task.kill()
                return

    def _is_at(self, task: Task, stage: str) -> bool:
        if stage in TRAINING_STAGES:
            return any(self.world.volume("deepseek-runs").glob(f"toy/{stage}-*/{CHECKPOINTS}/step_*/manifest.json"))
        folders = list(task.views["deepseek-runs"][1].folder.glob(f"toy/{stage}-*"))
        record = read_record(folders[0]) if folders else None
        return record is not None and record.status == "running"


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that is not written on and off."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name != "progress.json"
    }


def test_a_run_that_is_taken_away_in_each_stage(
    world: World, containers: Containers, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    takes = TakesAway(world)
    containers.looks.append(takes)
    place = ["--output-dir", str(tmp_path / "runs")]
    text = tmp_path / "book.txt"
    text.write_text("\n\n".join(f"The {n}th word is {n * 7 % 31} and no other." for n in range(900)))
    start = ["run", "--backend", "modal", "--gpu-type", "CPU", "--gpus", "2", "--pp-size", "2", "--run-name", "toy"]
    code = main([*start, *place, *SMALL, "--data", str(text)])
    log = world.text_of()
    assert code in (0, 1), log[-3000:]  # 1: a stage this small may learn nothing
    assert takes.taken == set(STAGES)
    assert [call.output is not None for call in world.calls.values()] == [True] * 4, "conductor, data, training, export"
    assert len(containers.of("train")) == 5 and len(containers.of("prepare")) == 4
    assert "checkpoint at step" in log, "training went on from what was committed"

    run_dir, there = tmp_path / "runs/toy", world.volume("deepseek-runs") / "toy"
    stages = read_status(run_dir)["stages"]
    assert all(entry["status"] in ("done", "learned_nothing") for entry in stages)
    # Of the others nothing had reached the volume yet: they began anew.
    assert {entry["stage"] for entry in stages if entry["attempt"] == 2} == set(STEPS)
    (export,) = run_dir.glob("export-*")
    assert files_of(export) == files_of(there / export.name)
    assert not list(run_dir.glob(f"*/{CHECKPOINTS}"))
    stored = (run_dir / "config.yaml").read_text()
    assert f"name: {text}" in stored and "backend: modal" in stored and str(tmp_path / "mnt") not in stored
    state = Registry().read("toy")
    assert state is not None and state.ended and Registry().holder("toy") is None

    # The model answers there, on CPUs, as it does here.
    ask = ["eval", "toy", "--stage", "sft", "--limit", "8"]
    assert main([*ask, "--backend", "modal", "--json", str(tmp_path / "there.json")]) == 0
    assert main([*ask, *place, "--no-tracking", "--json", str(tmp_path / "here.json")]) == 0
    said = [read_report(tmp_path / f"{name}.json").tasks[0].items for name in ("there", "here")]
    assert len(said[0]) == 8 and said[0] == said[1]
    assert containers.of("evaluate")

    # At home everything is finished; a change runs what depends on it, on Modal again, in another layout.
    capfd.readouterr()
    assert main(["resume", "toy", *place, "--backend", "cpu", "--dry-run"]) == 0
    assert capfd.readouterr().out.count("│ reuse") == len(STAGES)
    containers.looks.clear()
    calls = len(world.calls)
    change = ["--set", "distillation.steps=4", "--gpus", "1"]
    assert main(["resume", "toy", *place, *change]) in (0, 1)
    again = [world.functions[call.function].function_name for call in list(world.calls.values())[calls:]]
    assert again == ["conductor", "prepare", "train", "prepare"]
    before = {entry["stage"]: entry["folder"] for entry in stages}
    now = {entry["stage"]: entry["folder"] for entry in read_status(run_dir)["stages"]}
    assert [stage for stage in STAGES if now[stage] != before[stage]] == ["distillation", "export"]
    assert "backend: modal" in (run_dir / "config.yaml").read_text()


def test_a_run_that_is_stopped_saves_first_and_goes_on_at_home(
    world: World, containers: Containers, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "runs"
    place = ["--output-dir", str(folder)]
    start_there = ["run", "--backend", "modal", "--gpu-type", "CPU", "--gpus", "1", "--run-name", "toy", *place, *SMALL]
    assert main([*start_there, "--set", "pretrain.steps=300", "--until", "pretrain", "--detach"]) == 0
    until = time.monotonic() + 600
    while not (saved := list(world.volume("deepseek-runs").glob(f"toy/pretrain-*/{CHECKPOINTS}/step_*"))):
        assert time.monotonic() < until, world.text_of()[-3000:]
        time.sleep(0.5)
    assert main(["modal", "stop", "toy"]) == 0
    assert f"Saved is {saved[0].parents[1].name}/{CHECKPOINTS}/step_" in capfd.readouterr().out
    assert not world.requests(pb.FunctionCallCancelRequest), "it ended by itself"
    assert main(["modal", "pull", "toy", "--checkpoints", *place]) == 0
    (checkpoint,) = folder.glob(f"toy/pretrain-*/{CHECKPOINTS}/step_*")
    step = int(checkpoint.name.removeprefix("step_"))
    assert 0 < step < 300
    there = [line for line in read_metrics(checkpoint.parents[1]) if "train/loss" in line]
    finish(start("resume", "toy", "--backend", "cpu", "--until", "pretrain", folder=folder), folder)
    lines = [line for line in read_metrics(checkpoint.parents[1]) if "train/loss" in line]
    assert lines[: len(there)] == there, "the steps that were taken there, at their times"
    assert there[-1]["step"] == step and [line["step"] for line in lines] == list(range(1, 301)), "one history"


class TakesHostAway:
    """Takes the second of two hosts away once, when a checkpoint of both is on the volume; keeps what each wrote."""

    def __init__(self, world: World):
        self.world, self.taken, self.shards = world, False, dict[int, set[str]]()

    def __call__(self, task: Task) -> None:
        if task.group.size == 1 or task.preempted:
            return
        own = task.views["deepseek-runs"][1].folder
        if not self.taken:  # the first containers, which have nothing of each other's
            self.shards.setdefault(task.rank, set()).update(path.name for path in own.rglob("*.distcp"))
        there = self.world.volume("deepseek-runs").glob(f"toy/pretrain-*/{CHECKPOINTS}/step_*")
        if task.rank == 1 and not self.taken and any(len(list(path.glob("*.distcp"))) == 2 for path in there):
            self.taken = True
            task.kill()


def test_two_hosts_train_together_and_go_on_when_one_is_taken_away(
    world: World, containers: Containers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One CPU rank on each, Ray across them, no shared disk."""
    types = [each for each in gpus.TYPES if each.name != gpus.CPU]
    monkeypatch.setattr(gpus, "TYPES", (*types, gpus.GpuType(gpus.CPU, most=1, joins=True)))
    takes = TakesHostAway(world)
    containers.looks.append(takes)
    place = ["--output-dir", str(tmp_path / "runs"), "--run-name", "toy"]
    start = ["run", "--backend", "modal", "--gpu-type", "CPU", "--gpus", "2", "--pp-size", "2", *place, *SMALL]
    code = main([*start, "--skip", "grpo", "--skip", "distillation"])
    log = world.text_of()
    assert code in (0, 1), log[-3000:]
    assert takes.taken and takes.shards == {0: {"__0_0.distcp"}, 1: {"__1_0.distcp"}}, "a rank on each host"
    first, again, sft = containers.of("train")
    assert [len(group.tasks) for group in (first, again, sft)] == [2, 2, 2]
    assert log.count("checkpoint at step") == 1, "both went on from the same one"
    stages = read_status(tmp_path / "runs/toy")["stages"]
    assert {entry["stage"]: (entry["status"] in ("done", "learned_nothing"), entry["attempt"]) for entry in stages} == {
        "data_prep": (True, 1), "pretrain": (True, 2), "sft": (True, 1), "export": (True, 1),
    }  # fmt: skip

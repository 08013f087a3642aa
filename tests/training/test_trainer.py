"""The training loop and its checkpoints: what is kept, what a resumed run takes up, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.engine.checkpoints.checkpoint import list_checkpoints
from ray_pipeline.engine.checkpoints.checkpoint_writer import BEST_FILE
from ray_pipeline.errors import UserError
from ray_pipeline.launch.launchers import InlineLauncher
from ray_pipeline.records.metrics_file import read_metrics
from ray_pipeline.settings.run_folder import TIMELINE_FILE
from ray_pipeline.training.trainer import Best
from tests.training.toy_run import arguments, train


def fit(folder: Path, **settings: Any) -> dict[str, Any]:
    return InlineLauncher().run("pretrain", train, arguments(folder, **settings))


def checkpoints(folder: Path) -> Path:
    return folder / "toy" / "pretrain-0" / "checkpoints"


def logged(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what the clock decides."""
    lines = read_metrics(folder / "toy" / "pretrain-0")
    clock = ("time", "perf/", "memory/", "system/")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def best_of(folder: Path) -> dict[str, Any]:
    return json.loads((checkpoints(folder) / BEST_FILE).read_text())


def names(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(checkpoints(folder))]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, fit(folder)


@pytest.fixture
def copied(unbroken, tmp_path) -> Path:
    shutil.copytree(unbroken[0], tmp_path / "runs")
    return tmp_path / "runs"


def test_the_last_checkpoints_and_the_best_are_kept_and_the_best_is_named(unbroken):
    folder, figures = unbroken
    best = json.loads((checkpoints(folder) / BEST_FILE).read_text())
    page = json.loads((checkpoints(folder) / "step_00000008" / "trainer.json").read_text())
    measured = {line["step"]: line["val/validation_loss"] for line in logged(folder) if "val/validation_loss" in line}
    assert measured.keys() == {4, 8} and best["value"] == min(measured.values()) == measured[best["step"]]
    assert best["figure"] == "validation_loss" and best["checkpoint"] == f"step_{best['step']:08d}"
    assert names(folder) == sorted({best["step"], 6, 8})
    experts = ("load_entropy", "largest_load", "dropped_tokens", "idle_experts")
    assert page["extra"]["evaluated"] is False  # it was saved before it was evaluated
    assert page["extra"]["history"].keys() == {"train_loss", "validation_loss", *experts}
    assert page["extra"]["history"]["train_loss"] == figures["train_loss"]
    assert figures["dropped_tokens"] == 0 and 0 < figures["load_entropy"] <= 1 <= figures["largest_load"]


def test_one_step_is_recorded_with_what_the_rank_did(unbroken):
    stored = json.loads((unbroken[0] / "toy" / "pretrain-0" / TIMELINE_FILE).read_text())
    [rank] = stored["ranks"]
    assert stored["step"] == 3 and stored["of"] == 1
    kinds = [name for name, *_ in rank["spans"] if name != "wait"]
    assert kinds == ["next batch", *["F", "B"] * 4, "optimizer step"], "eight rows in micro-batches of two"
    times = [time for _, start, end in rank["spans"] for time in (start, end)]
    assert times == sorted(times)


def test_a_stage_that_was_interrupted_ends_with_the_same_weights(unbroken, tmp_path):
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, fault={"kind": "bug", "rank": 0, "step": 5})
    assert names(tmp_path) == [2, 4]
    resumed = fit(tmp_path)
    assert resumed["started"] == 4
    assert resumed | {"started": 0} == unbroken[1]


def struck(where: str, step: int = 0) -> dict[str, Any]:
    return {"kind": "bug", "rank": 0, "step": step, "where": where}


@pytest.mark.parametrize("fault", [struck("evaluate"), struck("batch", 4)], ids=["evaluating", "after it"])
def test_a_run_that_ends_in_or_after_an_evaluation_has_the_same_figures_once(unbroken, tmp_path, fault):
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, fault=fault)
    assert names(tmp_path) == [2, 4], "the checkpoint of step 4 comes before its evaluation"
    resumed = fit(tmp_path)
    assert resumed["started"] == 4
    assert resumed | {"started": 0} == unbroken[1]
    assert logged(tmp_path) == logged(unbroken[0])
    assert best_of(tmp_path) == best_of(unbroken[0])


def test_a_run_killed_in_its_last_evaluation_still_takes_it(unbroken, tmp_path, monkeypatch):
    shutil.copytree(unbroken[0], tmp_path, dirs_exist_ok=True)
    log = tmp_path / "toy" / "pretrain-0" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    (checkpoints(tmp_path) / BEST_FILE).unlink()
    resumed = fit(tmp_path)
    assert resumed == unbroken[1] | {"started": 8}
    assert logged(tmp_path) == logged(unbroken[0]) and best_of(tmp_path) == best_of(unbroken[0])


def test_an_evaluation_that_is_due_alone_is_not_taken_again(tmp_path):
    """At step 3 the best is saved after its evaluation, which its checkpoint then holds."""
    fit(tmp_path, steps=4, checkpoint_every=4, eval_every=3)
    page = json.loads((checkpoints(tmp_path) / "step_00000003" / "trainer.json").read_text())
    assert page["extra"]["evaluated"] is True and page["extra"]["best"]["step"] == 3


MECHANISMS = {
    "muon": ({}, {"optimizer": {"name": "muon", "warmup_steps": 0, "lr": 1e-2}}),
    "balance over the batch": ({"aux_loss_alpha": 0.1, "seq_aux": False, "topk_method": "greedy"}, {}),
    "dyt and recursion": ({"norm": "dyt", "recursion_depth": 2, "aux_loss_alpha": 0.1}, {}),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_with_every_mechanism_an_interrupted_stage_ends_with_the_same_weights(tmp_path, name):
    model, settings = MECHANISMS[name]

    def run(folder: str, **more: Any) -> dict[str, Any]:
        job = arguments(tmp_path / folder, **settings, **more)
        job["config"]["model"] |= model
        return InlineLauncher().run("pretrain", train, job)

    whole = run("whole")
    with pytest.raises(ZeroDivisionError):
        run("cut", fault={"kind": "bug", "rank": 0, "step": 5})
    resumed = run("cut")
    assert resumed["started"] == 4
    assert resumed | {"started": 0} == whole
    assert ("aux_loss" in whole) == ("aux_loss_alpha" in model)


def test_the_best_is_kept_however_often_checkpoints_are_due(tmp_path):
    fit(tmp_path, steps=6, checkpoint_every=5, eval_every=1, keep_checkpoints=1)
    best = json.loads((checkpoints(tmp_path) / BEST_FILE).read_text())["step"]
    assert names(tmp_path) == sorted({best, 6})


def test_keep_best_off_keeps_the_last_alone(tmp_path):
    fit(tmp_path, steps=4, checkpoint_every=2, eval_every=1, keep_checkpoints=1, keep_best=False)
    assert names(tmp_path) == [4]
    assert not (checkpoints(tmp_path) / BEST_FILE).exists()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def commands(said: str) -> list[str]:
    return [line.strip() for line in said.splitlines() if line.startswith("  ")]


def run_move(command: str) -> None:
    move, source, target = command.split()
    assert move == "mv"
    Path(source).rename(target)


def test_a_damaged_checkpoint_is_named_and_the_way_out_leads_to_the_same_weights(copied, unbroken):
    flip(checkpoints(copied) / "step_00000008" / "__0_0.distcp")
    with pytest.raises(UserError, match=r"step_00000008/__0_0\.distcp: damaged") as caught:
        fit(copied)
    assert "The checkpoint of step 6 is whole." in str(caught.value)
    move, resume = commands(str(caught.value))
    assert resume == f"python -m ray_pipeline.cli resume toy --output-dir {copied}"
    run_move(move)
    resumed = fit(copied)
    assert (resumed["started"], resumed["digest"]) == (6, unbroken[1]["digest"])


def test_when_none_is_whole_the_way_out_leads_to_the_beginning(copied, unbroken):
    for path in list_checkpoints(checkpoints(copied)):
        (path / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp: missing.*\nNo older checkpoint is whole") as caught:
        fit(copied)
    run_move(commands(str(caught.value))[0])
    resumed = fit(copied)
    assert (resumed["started"], resumed["digest"]) == (0, unbroken[1]["digest"])


def test_a_checkpoint_of_another_model_is_refused(copied):
    job = arguments(copied)
    job["config"]["model"]["rope_theta"] = 5000.0
    with pytest.raises(UserError, match=re.escape("another model: model.rope_theta is ")):
        InlineLauncher().run("pretrain", train, job)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.sampled_from(["accuracy", "validation_loss"]))
def test_the_best_of_a_run_is_the_first_of_the_best(values, figure):
    best: Best | None = None
    for step, value in enumerate(values):
        found = Best.of(step, {figure: value, "format_rate": 0.5})
        assert found is not None
        best = found if found.beats(best) else best
    choose = max if figure == "accuracy" else min
    loss = choose(values) if figure == "validation_loss" else None
    assert best == Best(values.index(choose(values)), figure, choose(values), loss)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 9)), min_size=1, max_size=20), st.booleans())
def test_of_equal_accuracies_the_one_of_the_lowest_loss_is_the_best(found, preferences):
    names = ("preference_accuracy", "preference_loss") if preferences else ("accuracy", "validation_loss")
    best: Best | None = None
    for step, (right, loss) in enumerate(found):
        one = Best.of(step, {names[0]: right / 3, names[1]: loss, "format_rate": 0.5})
        assert one is not None
        best = one if one.beats(best) else best
    highest = max(right for right, _ in found)
    lowest = min(loss for right, loss in found if right == highest)
    assert best == Best(found.index((highest, lowest)), names[0], highest / 3, lowest)


def test_where_no_loss_is_measured_or_it_is_no_number_the_first_of_equals_stays():
    first, later = Best(1, "accuracy", 0.5), Best(2, "accuracy", 0.5, 1.0)
    assert not later.beats(first) and not Best(3, "accuracy", 0.5).beats(later)
    assert not Best(3, "accuracy", 0.5, float("nan")).beats(later)
    assert Best(3, "accuracy", 0.6, 9.0).beats(later)


def test_accuracy_decides_where_it_is_measured_and_nothing_decides_without_figures():
    assert Best.of(3, {"validation_loss": 1.0, "accuracy": 0.5}) == Best(3, "accuracy", 0.5, 1.0)
    assert Best.of(3, {"reward": 1.0}) is None
    assert Best.of(3, {"validation_loss": float("nan")}) is None

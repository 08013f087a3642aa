"""The DAG on Ray with toy stages: what runs, what does not, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ray_pipeline.dag import workflow
from ray_pipeline.dag.ledger import RunLock, read_record, read_status
from ray_pipeline.dag.request import RunRequest, StageSelection
from ray_pipeline.dag.workflow import execute
from ray_pipeline.errors import UserError
from ray_pipeline.launch.local_ray import start_ray
from ray_pipeline.records import input_files
from ray_pipeline.records.rank_output import output_file
from ray_pipeline.settings.run_folder import rerun_folder
from tests.dag import toy_stages as toy


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    import ray

    start_ray(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


def run(folder: Path, *, functions=toy.FUNCTIONS, stages=None, ranks: int = 1, dry_run: bool = False, **values) -> int:
    stages = stages or StageSelection()
    return execute(
        RunRequest(toy.config(folder, **values), toy.layout(ranks), stages, False, dry_run, stage_functions=functions)
    )


def resume(folder: Path, *, functions=toy.FUNCTIONS, stages=None, ranks: int = 1, **values) -> int:
    stages = stages or StageSelection()
    return execute(
        RunRequest(toy.config(folder, **values), toy.layout(ranks), stages, True, False, stage_functions=functions)
    )


def statuses(folder: Path) -> dict[str, str]:
    return {entry["stage"]: entry["status"] for entry in read_status(folder / "toy")["stages"]}


def test_run_rerun_change_and_selections(tmp_path, capsys):
    """One run folder through its life, so that stages are started once."""
    assert run(tmp_path) == 0
    assert toy.calls(tmp_path / "toy") == list(toy.CHAIN)
    said = capsys.readouterr().out
    assert "not run yet" in said
    assert "held-out accuracy 50.0%" in said
    assert "input 25.0% (+25.0 points)" in said
    assert set(statuses(tmp_path).values()) == {"done"}
    assert "held-out accuracy 50.0%" in (tmp_path / "toy" / "report.html").read_text()

    assert run(tmp_path) == 0
    assert toy.calls(tmp_path / "toy") == [], "a rerun executes nothing"
    assert "REUSED" in capsys.readouterr().out

    with pytest.raises(UserError, match=r"with another config:\n  grpo\.beta 0\.01 → 0\.02\n.*resume toy .*--set"):
        run(tmp_path, grpo__beta=0.02)
    assert resume(tmp_path, grpo__beta=0.02) == 0
    assert toy.calls(tmp_path / "toy") == ["grpo", "distillation", "export"]
    said = capsys.readouterr().out
    assert "config changed: grpo.beta 0.01 → 0.02" in said
    assert "upstream grpo reruns" in said

    assert resume(tmp_path) == 0
    assert toy.calls(tmp_path / "toy") == [], "the outputs of the earlier settings are still there"

    before = read_status(tmp_path / "toy")["stages"][2]
    assert run(tmp_path, stages=StageSelection(only="sft")) == 0
    assert toy.calls(tmp_path / "toy") == ["sft"]
    after = read_status(tmp_path / "toy")["stages"][2]
    assert before["wandb_id"] != after["wandb_id"], "a stage started afresh is another W&B run"
    assert run(tmp_path, stages=StageSelection(from_="grpo", until="distillation")) == 0
    assert toy.calls(tmp_path / "toy") == ["grpo", "distillation"]


def test_a_finished_stage_stays_until_its_new_attempt_is_whole(tmp_path, capsys):
    until = StageSelection(until="sft")
    assert run(tmp_path, stages=until) == 0
    [folder] = (tmp_path / "toy").glob("sft-*")
    (folder / "mark").touch()
    capsys.readouterr()
    assert run(tmp_path, functions=toy.FUNCTIONS | {"sft": toy.bug}, stages=StageSelection(only="sft")) == 1
    said, again = capsys.readouterr().out.replace("\n", ""), folder.with_name(f"{folder.name}.again")
    assert f"The finished sft of before is still there. To stay with it: rm -r {again}" in said
    entry = read_status(tmp_path / "toy")["stages"][2]
    assert (entry["status"], entry["again"]["status"], entry["folder"]) == ("done", "failed", str(folder))
    assert (folder / "mark").exists() and read_record(folder).is_finished
    toy.calls(tmp_path / "toy")
    assert resume(tmp_path, stages=until) == 0
    assert toy.calls(tmp_path / "toy") == ["sft"]
    assert not again.exists() and not (folder / "mark").exists() and read_record(folder).attempt == 2
    assert [path.name for path in (tmp_path / "toy").glob(".sft*")] == []


def test_a_kill_while_a_new_attempt_takes_its_place_loses_neither(tmp_path):
    until = StageSelection(until="sft")
    assert run(tmp_path, stages=until) == 0
    [folder] = (tmp_path / "toy").glob("sft-*")
    shutil.copytree(folder, rerun_folder(folder))
    (rerun_folder(folder) / "new").touch()
    folder.rename(folder.with_name(f".{folder.name}.old"))
    toy.calls(tmp_path / "toy")
    assert resume(tmp_path, stages=until) == 0
    assert toy.calls(tmp_path / "toy") == []
    assert (folder / "new").exists()
    assert sorted(path.name for path in (tmp_path / "toy").glob("*sft*")) == [folder.name]


@pytest.mark.parametrize("name", ["config.yaml", "report.html"])
def test_a_folder_that_is_no_run_is_not_written_to(tmp_path, name):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name}: is there, but no run\.json beside it.* another --run-name"):
        run(tmp_path)
    assert [(path.name, path.read_text()) for path in (tmp_path / "toy").iterdir()] == [(name, "mine")]


def test_until_stops_and_stage_needs_its_inputs(tmp_path):
    assert run(tmp_path, stages=StageSelection(until="pretrain")) == 0
    assert toy.calls(tmp_path / "toy") == ["data_prep", "pretrain"]
    with pytest.raises(UserError, match=r"--stage grpo: grpo reads the outputs of sft, which is not finished"):
        run(tmp_path, stages=StageSelection(only="grpo"))
    assert statuses(tmp_path)["sft"] == "pending"


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert run(tmp_path, dry_run=True) == 0
    assert list(tmp_path.iterdir()) == []
    assert "not run yet" in capsys.readouterr().out


def test_stage_that_fails_is_told_in_few_lines_and_resumed(tmp_path, capsys):
    assert run(tmp_path, functions=toy.FUNCTIONS | {"sft": toy.bug}) == 1
    said = capsys.readouterr().out
    assert "sft FAILED: ZeroDivisionError: a bug in a stage" in said
    assert "Traceback (most recent call last)" not in said
    status = {entry["stage"]: entry for entry in read_status(tmp_path / "toy")["stages"]}
    assert (status["sft"]["status"], status["grpo"]["status"]) == ("failed", "pending")
    [log] = (tmp_path / "toy").glob("sft-*/logs/stage.log")
    assert f"What it printed: {log}" in said.replace("\n", "") and log.read_text() == "what a library says\n"
    assert status["sft"]["error_log"] in said.replace("\n", "")
    assert "toy_stages.py" in Path(status["sft"]["error_log"]).read_text()
    toy.calls(tmp_path / "toy")
    assert resume(tmp_path) == 0
    assert toy.calls(tmp_path / "toy") == ["sft", "grpo", "distillation", "export"]
    assert "failed (ZeroDivisionError: a bug in a stage): no checkpoint yet" in capsys.readouterr().out


def test_mistake_found_by_a_stage_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"^input\.txt line 3: no field text\. Add it\.$"):
        run(tmp_path, functions=toy.FUNCTIONS | {"data_prep": toy.user_mistake})
    assert statuses(tmp_path)["data_prep"] == "failed"


def test_stage_that_learns_nothing_makes_the_exit_code_one_and_the_rest_goes_on(tmp_path, capsys):
    functions = toy.FUNCTIONS | {"grpo": toy.learns_nothing}
    assert run(tmp_path, functions=functions) == 1
    assert toy.calls(tmp_path / "toy") == ["data_prep", "pretrain", "sft", "distillation", "export"]
    assert "LEARNED NOTHING" in capsys.readouterr().out
    assert run(tmp_path, functions=functions) == 1, "it still has learned nothing"
    assert toy.calls(tmp_path / "toy") == []


def test_a_refused_export_makes_the_exit_code_one(tmp_path, capsys):
    assert run(tmp_path, functions=toy.FUNCTIONS | {"export": toy.refuses}) == 1
    assert "REFUSED: model-q2_k.gguf: rounding makes another model of it" in capsys.readouterr().out


def test_second_run_on_one_folder_is_refused(tmp_path):
    with RunLock(tmp_path / "toy"), pytest.raises(UserError, match=r"toy: process \d+ on .* is working on this run"):
        run(tmp_path)
    assert toy.calls(tmp_path / "toy") == []


def test_output_folder_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "toy").write_text("")
    with pytest.raises(UserError, match=r"toy: a file is in the way of a folder"):
        run(tmp_path)


def test_changed_contents_of_a_data_file_rerun_all_and_its_loss_does_not(tmp_path):
    data = tmp_path / "text.txt"
    data.write_text("one")
    source = {"data__pretrain": [{"name": str(data)}]}
    only = StageSelection(until="data_prep")
    assert run(tmp_path, stages=only, **source) == 0
    data.write_text("two")
    with pytest.raises(UserError, match=r"data\.pretrain\.0\.name contents \w+ → contents \w+"):
        run(tmp_path, stages=only, **source)
    assert resume(tmp_path, stages=only, **source) == 0
    assert toy.calls(tmp_path / "toy") == ["data_prep", "data_prep"]
    data.unlink()
    assert resume(tmp_path, stages=only, **source) == 0
    assert toy.calls(tmp_path / "toy") == []


def test_a_file_that_changes_before_it_is_read_is_not_stored_under_the_old_identity(tmp_path):
    data = tmp_path / "text.txt"
    data.write_text("one")
    source = {"data__pretrain": [{"name": str(data)}]}
    only = StageSelection(until="data_prep")

    def changing(context):
        data.write_text("two")
        return toy.note(context, "data_prep")

    functions = {**toy.FUNCTIONS, "data_prep": changing}
    with pytest.raises(UserError, match=r"text\.txt: changed since this run looked at it.*Run the same command again"):
        run(tmp_path, functions=functions, stages=only, **source)
    assert read_status(tmp_path / "toy")["stages"][0]["status"] == "failed"
    assert resume(tmp_path, stages=only, **source) == 0
    assert len(list((tmp_path / "toy").glob("data_prep-*"))) == 2


def test_an_input_is_hashed_once_in_a_run_whatever_the_number_of_processes(tmp_path, monkeypatch):
    data = tmp_path / "text.txt"
    data.write_text("one")
    hashed, whole = [], input_files.file_sha256
    monkeypatch.setattr(input_files, "file_sha256", lambda path: hashed.append(path.name) or whole(path))
    monkeypatch.setattr(input_files, "_SETTLED_NS", 0)

    def looking(context):
        """Whether the digest is known in this process, which then was not given it by the note."""
        before = input_files._sha256_once.cache_info().hits
        (path,) = context.guard.files
        input_files._sha256_once(path.absolute(), input_files.stamp_of(path))
        hit = input_files._sha256_once.cache_info().hits > before
        (context.run_dir / "hashed").write_text("again" if hit else "once")
        return toy.note(context, "data_prep")

    functions = {**toy.FUNCTIONS, "data_prep": looking}
    source = {"data__pretrain": [{"name": str(data)}]}
    assert run(tmp_path, functions=functions, stages=StageSelection(until="data_prep"), **source) == 0
    assert hashed == ["text.txt"] and (tmp_path / "toy" / "hashed").read_text() == "once"


def test_a_file_that_changes_while_the_run_is_planned_is_refused(tmp_path, monkeypatch):
    data = tmp_path / "text.txt"
    data.write_text("one")
    monkeypatch.setattr(workflow, "print_plan", lambda *_: data.write_text("two"))
    with pytest.raises(UserError, match="An input file changed while the plan was made"):
        run(tmp_path, data__pretrain=[{"name": str(data)}])
    assert toy.calls(tmp_path / "toy") == []


def test_killed_worker_is_restarted_from_its_checkpoint(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "kill-rank-0").write_text("")
    until = StageSelection(until="pretrain")
    assert run(tmp_path, functions=toy.RANKED, stages=until, ranks=2) == 0
    metrics = read_status(tmp_path / "toy")["stages"][1]["metrics"]
    assert not (tmp_path / "toy" / "kill-rank-0").exists()
    [folder] = (tmp_path / "toy").glob("pretrain-*")
    for rank in range(2):  # both attempts'
        said = output_file(folder, f"rank-{rank}").read_text()
        assert [line for line in said.splitlines() if line.startswith("rank")] == [
            f"rank {rank} begins at step {step}" for step in (0, 4)
        ]
    assert metrics["started_at"] == 4.0
    value = 7
    for step in range(toy.STEPS):
        value = (value * 31 + step + 1) % 1_000_003
    assert metrics["validation_loss"] == value / 1_000_003


def test_mistake_found_by_a_rank_is_told_and_not_tried_again(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "user-error").write_text("")
    with pytest.raises(UserError, match=r"^loss nan at step 2: training diverged\. Lower the rate\.$"):
        run(tmp_path, functions=toy.RANKED, stages=StageSelection(until="pretrain"), ranks=2)
    (folder,) = (tmp_path / "toy").glob("pretrain-*")
    assert (folder / "attempts.log").read_text() == "x"


def test_ranks_the_cluster_can_never_hold_are_refused_before_anything_starts(tmp_path):
    from ray_pipeline.layout.layout import Layout

    with pytest.raises(UserError, match=r"4 ranks with a GPU each: the Ray cluster has 0 GPUs and 2 CPUs on 1 node"):
        execute(RunRequest(toy.config(tmp_path), Layout(gpus=4, dp=4, device="cuda"), stage_functions=toy.FUNCTIONS))
    assert toy.calls(tmp_path / "toy") == []


def test_config_of_the_run_is_stored_whole(tmp_path):
    from ray_pipeline.settings.loading import load_config

    run(tmp_path, stages=StageSelection(until="data_prep"))
    stored = load_config(tmp_path / "toy" / "config.yaml")
    assert stored.run_name == "toy"
    assert stored.grpo == toy.config(tmp_path).grpo
    assert json.loads((tmp_path / "toy" / "run.json").read_text())["stages"]["grpo"]["decides"]["grpo.beta"] == 0.01

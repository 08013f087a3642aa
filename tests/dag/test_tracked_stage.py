"""What trackers are told of a stage: a name of its own after a change, what made it, what it cost, how it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.dag.ledger import Record, RunFile, begin_record, close_record
from ray_pipeline.dag.tracked_stage import bad_ending, good_ending, tracked_run
from ray_pipeline.errors import UserError
from ray_pipeline.launch.launchers import InlineLauncher
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.settings.run_folder import MANIFEST
from ray_pipeline.settings.schema import CostConfig, PipelineFields


def context(tmp_path: Path, stage: str = "sft", **inputs: Path) -> StageContext:
    run = RunFile(tmp_path)
    run.chain = ["data_prep", "pretrain", stage]
    run.stages["pretrain"] = {"identity": "a", "folder": "pretrain-a", "decides": {}}
    run.save()
    folder = tmp_path / f"{stage}-b"
    folder.mkdir()
    config = PipelineFields(run_name="toy", output_dir=tmp_path.parent, cost=CostConfig(usd_per_gpu_hour=2.0))
    results = {name: StageResult(path) for name, path in inputs.items()}
    return StageContext(config, "toy", tmp_path, folder, results, InlineLauncher(), wandb_id="id1")


@pytest.fixture
def upstream(tmp_path: Path) -> dict[str, Path]:
    """Pretraining that took half an hour on two ranks, and the data that it read."""
    pretrain, data = tmp_path / "pretrain-a", tmp_path / "data_prep-a"
    record = begin_record(pretrain, Record("pretrain", "a", "running", ranks=2))
    record.seconds = 1800.0
    close_record(pretrain, record, "done", metrics={}, baselines={}, learned=True, weights_digest="f" * 64)
    data.mkdir()
    write_sealed(data / MANIFEST, {"files": {}})
    return {"pretrain": pretrain, "data_prep": data}


def test_a_rerun_with_other_settings_is_told_apart_by_its_name_and_both_are_of_the_group(tmp_path, upstream):
    one = context(tmp_path, **upstream)
    first, second = (tracked_run(one, Record("sft", identity, "running")) for identity in ("1" * 64, "2" * 64))
    assert (first.name, second.name) == ("toy-sft-111111", "toy-sft-222222")
    assert first.group == second.group == "toy" and first.run_id == "id1"


def test_the_config_names_settings_versions_commit_and_what_it_was_made_from(tmp_path, upstream):
    run = tracked_run(context(tmp_path, **upstream), Record("sft", "1" * 64, "running", ranks=3))
    assert run.config["sft"]["steps"] == PipelineFields().sft.steps
    assert {"torch", "ray"} <= run.config["versions"].keys() and run.config["commit"] and run.config["ranks"] == 3
    assert run.upstream["pretrain"] == "f" * 64 and len(run.upstream["data_prep"]) == 64
    assert run.config["made_from"] == run.upstream


def test_the_ending_has_baselines_parameters_cost_and_what_was_made(tmp_path, upstream):
    one = context(tmp_path, **upstream)
    (one.folder / "model").mkdir()
    ended = good_ending(one, StageResult(one.folder, {"accuracy": 0.5}, {"input_accuracy": 0.5}, False), "e" * 64)
    told = ended.summary()
    assert (told["verdict"], told["exit_code"], told["baseline/input_accuracy"]) == ("LEARNED NOTHING", 1, 0.5)
    assert told["params"] == PipelineFields().model.num_params()
    assert told["cost/run_usd"] == pytest.approx(0.5 * 2 * 2.0, rel=1e-3)
    assert tracked_run(one, Record("sft", "1", "running")).spent() == pytest.approx(2.0, rel=1e-3)
    assert ended.outputs == {"model": one.folder / "model"} and ended.digest == "e" * 64


@pytest.mark.parametrize(("stage", "kind"), [("data_prep", "data"), ("export", "export")])
def test_data_and_exports_are_what_their_stages_make(tmp_path, upstream, stage, kind):
    one = context(tmp_path, stage) if stage == "export" else context(tmp_path, "sft", **upstream)
    folder = upstream["data_prep"] if stage == "data_prep" else one.folder
    moved = StageContext(one.config, "toy", tmp_path, folder, {}, one.launcher)
    ended = good_ending(moved, StageResult(folder, {}, {}, None), None)
    assert ended.outputs == {kind: folder} and ended.verdict == "DONE"
    if stage == "data_prep":
        assert len(ended.digest) == 64


@pytest.mark.parametrize(("error", "code"), [(UserError("no such file"), 2), (RuntimeError("boom"), 1)])
def test_a_failure_is_told_with_its_reason_and_exit_code(error, code):
    told = bad_ending(error).summary()
    assert (told["verdict"], told["exit_code"]) == ("FAILED", code) and str(error) in told["reason"]

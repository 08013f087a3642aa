"""All six real stages through Ray and the command line, at toy size."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.records.trackers import read_metrics, read_samples
from ray_pipeline.settings.chain import chain
from ray_pipeline.settings.schema import PipelineFields
from tests.pipeline.driving import TOY, digests, finish, kill, stages, start, wait_until_stage_works

STAGES = chain(PipelineFields())
RUN = ("run", "--config", str(TOY), "--run-name", "toy", "--gpus", "3", "--pp-size", "3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder that was killed in SFT with kill -9 and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    process = start(*RUN, folder=folder)
    wait_until_stage_works(process, folder, "toy", "sft", step=8)
    kill(process)
    finish(start("resume", "toy", folder=folder), folder)
    return folder


def test_six_stages_finish_and_leave_what_they_promise(finished):
    entries = stages(finished, "toy")
    assert list(entries) == list(STAGES)
    assert all(entry["status"] in ("done", "learned_nothing") for entry in entries.values())
    pretrain = entries["pretrain"]
    assert pretrain["metrics"]["validation_loss"] < pretrain["baselines"]["ln_vocab"]
    export = Path(entries["export"]["folder"])
    for name in ("hf/model.safetensors", "hf-student/config.json", "model-f32.gguf", "model-q8_0.gguf", "checks.json"):
        assert (export / name).exists(), name
    assert entries["distillation"]["metrics"]["params"] < entries["distillation"]["metrics"]["teacher_params"]


def test_killed_in_sft_it_resumed_in_sft_with_the_same_wandb_run(finished):
    entries = stages(finished, "toy")
    assert entries["pretrain"]["attempt"] == 1
    assert entries["sft"]["attempt"] == 2
    lines = read_metrics(Path(entries["sft"]["folder"]))
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == sorted(set(steps)) == list(range(2, 25, 2))
    assert list((finished / "toy").rglob(f"run-{entries['sft']['wandb_id']}.wandb"))


def test_the_resumed_run_has_the_weights_of_an_unbroken_one(finished, tmp_path):
    finish(start(*RUN, folder=tmp_path), tmp_path)
    unbroken = digests(tmp_path, "toy")
    assert len(unbroken) == 4
    assert digests(finished, "toy") == unbroken


def test_rerun_executes_nothing_and_a_changed_beta_reruns_grpo_and_later(finished):
    before = stages(finished, "toy")
    finish(start(*RUN, folder=finished), finished)
    assert stages(finished, "toy") == before
    finish(start("resume", "toy", "--set", "grpo.beta=0.2", folder=finished), finished)
    after = stages(finished, "toy")
    changed = [name for name in STAGES if after[name]["identity"] != before[name]["identity"]]
    assert changed == ["grpo", "distillation", "export"]
    assert [after[name] for name in ("data_prep", "pretrain", "sft")] == [
        before[name] for name in ("data_prep", "pretrain", "sft")
    ]


def test_samples_and_report_can_be_read(finished):
    grpo = Path(stages(finished, "toy")["grpo"]["folder"])
    samples = read_samples(grpo)
    assert samples and {"prompt", "completion", "answer", "correct"} <= samples[0].keys()
    assert "<svg" in (finished / "toy" / "report.html").read_text()

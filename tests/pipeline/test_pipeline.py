"""All six real stages through Ray and the command line, at toy size."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ray_pipeline.records.metrics_file import read_metrics, read_samples
from ray_pipeline.settings.chain import chain
from ray_pipeline.settings.schema import PipelineFields
from tests.pipeline.driving import TOY, digests, finish, kill, stages, start, wait_until_stage_works
from tests.report.looking import look_at
from tests.serving.browser import browser

STAGES = chain(PipelineFields())
RUN = ("run", "--config", str(TOY), "--run-name", "toy", "--gpus", "2", "--pp-size", "2")


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
    for name in ("hf/model.safetensors", "hf-student/config.json", "model-f32.gguf", "model-q8_0.gguf", "export.json"):
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


def test_the_resumed_stage_has_the_weights_of_an_unbroken_one(finished, tmp_path):
    """From the same PRETRAIN: the run's folder without what came behind it."""
    later = [f"{stage}-*" for stage in STAGES if stage not in ("data_prep", "pretrain")]
    shutil.copytree(finished / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns(*later))
    finish(start("resume", "toy", "--until", "sft", folder=tmp_path), tmp_path)
    entries = stages(tmp_path, "toy")
    assert (entries["pretrain"]["attempt"], entries["sft"]["attempt"]) == (1, 1)
    assert digests(tmp_path, "toy")["sft"] == digests(finished, "toy")["sft"]


def test_rerun_executes_nothing(finished):
    before = stages(finished, "toy")
    finish(start(*RUN, folder=finished), finished)
    assert stages(finished, "toy") == before


def test_samples_and_report_can_be_read(finished):
    grpo = Path(stages(finished, "toy")["grpo"]["folder"])
    samples = read_samples(grpo)
    assert samples and {"prompt", "completion", "answer", "correct"} <= samples[0].keys()
    report = (finished / "toy" / "report.html").read_text()
    assert "Tokens per second" in report and "The same questions" in report and "python -m ray_pipeline.cli" in report


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_section_of_the_report_has_its_place_on_a_screen_and_a_phone(finished, tmp_path, width, scheme):
    with browser() as started:
        sections = look_at(started, finished / "toy" / "report.html", width, scheme, tmp_path / f"{width}.png")
    assert sections == ["stages", "curves", "evaluation", "questions", "data", "again"]


@pytest.mark.slow
def test_the_stages_behind_the_resumed_one_have_the_weights_of_an_unbroken_run(finished, tmp_path):
    finish(start(*RUN, "--no-wandb", folder=tmp_path), tmp_path)
    unbroken = digests(tmp_path, "toy")
    assert len(unbroken) == 4
    assert digests(finished, "toy") == unbroken


@pytest.mark.slow
def test_a_changed_beta_reruns_grpo_and_later(finished):
    """As `tests/dag/test_workflow.py` has it with toy stages."""
    before = stages(finished, "toy")
    finish(start("resume", "toy", "--set", "grpo.beta=0.2", folder=finished), finished)
    after = stages(finished, "toy")
    changed = [name for name in STAGES if after[name]["identity"] != before[name]["identity"]]
    assert changed == ["grpo", "distillation", "export"]
    assert [after[name] for name in ("data_prep", "pretrain", "sft")] == [
        before[name] for name in ("data_prep", "pretrain", "sft")
    ]

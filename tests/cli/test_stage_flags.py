"""`--skip` and `--dpo`: short names for a run's list of stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.dag.ledger import RunFile
from ray_pipeline.settings.loading import config_yaml, load_config
from tests.settings.test_init_from import FIXED, write


def shown(capsys: pytest.CaptureFixture, *flags: str) -> list[str]:
    assert main(["config-show", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)["stages"]


def test_stages_are_left_out_and_dpo_joins(capsys: pytest.CaptureFixture) -> None:
    every = ["data_prep", "pretrain", "sft", "grpo", "distillation", "export"]
    assert shown(capsys) == every
    assert shown(capsys, "--skip", "grpo", "--skip", "distillation") == ["data_prep", "pretrain", "sft", "export"]
    assert set(shown(capsys, "--dpo")) == {*every, "dpo"}
    assert shown(capsys, "--set", "stages=[data_prep, pretrain, sft]", "--skip", "sft") == ["data_prep", "pretrain"]


def test_a_published_folder_needs_no_pretraining(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    folder = write(tmp_path / "given")
    settings = [f"--set={key}={json.dumps(value)}" for key, value in FIXED.items()]
    flags = ("--init-from", str(folder), *settings, "--skip", "pretrain")
    assert "pretrain" not in shown(capsys, *flags)
    assert shown(capsys, *flags, "--skip", "sft", "--skip", "grpo") == ["data_prep", "distillation", "export"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--skip", "stf"], '--skip stf: no such stage (did you mean "sft"?)'),
        (["--skip", "dpo"], "--skip dpo: this run has the stages data_prep, pretrain, sft, grpo, distillation, export"),
        (["--skip", "pretrain"], "sft starts from weights that no stage makes. Add pretrain, or give a model folder"),
        (["--skip", "data_prep"], "every other stage reads data_prep's data"),
        (["--skip", "sft", "--stage", "sft"], "--stage sft: this run has the stages"),
        (["--stage", "dpo"], "Add dpo to `stages` to have it"),
    ],
)
def test_a_run_without_what_it_reads_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert main(["run", "--output-dir", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_resume_changes_the_stages_of_a_run_and_reuses_what_they_share(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    run_dir = tmp_path / "mine"
    RunFile(run_dir).save()
    (run_dir / "config.yaml").write_text(config_yaml(load_config(None, {"run_name": "mine"})))
    assert main(["resume", str(run_dir), "--dpo", "--skip", "grpo", "--dry-run", "--backend", "cpu"]) == 0
    plan = capsys.readouterr().out
    assert "dpo" in plan and "grpo" not in plan


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("grpo.rewards={anser: 1.0}", 'did you mean "answer"'),
        ("grpo.rewards={no_such_module_here:f: 1.0}", "no_such_module_here"),
        ("grpo.rollout.engine=vllm", "engine=vllm: not offered"),
        ("distillation.teacher=nowhere", "distillation.teacher=nowhere: no such folder"),
        ("distillation.teacher_layout={pp_size: 2}", "distillation.teacher_layout: "),
    ],
)
def test_what_grpo_and_distillation_name_is_looked_for_before_anything_starts(
    setting: str, message: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert main(["run", "--output-dir", str(tmp_path / "runs"), "--gpus", "1", "--set", setting]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

"""`test` says what works, what does not and why, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from ray_pipeline.cli import main, smoke
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import STAGES
from tests.cli.made_run import make_run


def test_the_recipe_has_every_stage_and_few_steps() -> None:
    config = load_config(Path(smoke.RECIPE))
    assert tuple(config.stages) == STAGES
    assert max(getattr(config, name).steps for name in ("pretrain", "sft", "dpo", "grpo", "distillation")) <= 3


def test_a_stage_that_did_not_end_is_named_with_the_cause_and_the_later_ones_are_not_run(tmp_path: Path) -> None:
    rows = smoke.stage_rows(smoke.entries(make_run(tmp_path)), "the disk is full")
    assert [(row.name, row.status) for row in rows] == [
        ("data_prep", "passed"),
        ("pretrain", "passed"),
        ("sft", "passed"),
        ("grpo", "failed"),
        ("distillation", "not run"),
        ("export", "not run"),
    ]
    assert rows[3].detail == "the disk is full"
    assert smoke.stage_rows([], "no module named ray") == [smoke.Part("start", "failed", 0.0, "no module named ray")]


def test_a_program_that_does_not_start_is_exit_code_1_with_its_last_words(tmp_path, monkeypatch, capsys) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho Error: no torch here >&2\nexit 3\n")
    broken.chmod(0o755)
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(smoke.sys, "executable", str(broken))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    assert main(["test"]) == 1
    said = capsys.readouterr()
    assert "FAILED at start: no torch here" in said.err and "not run" in said.out
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_this_installation_works(capsys) -> None:
    assert main(["test"]) == 0
    out = capsys.readouterr().out
    assert "This installation works" in out and "answer" in out

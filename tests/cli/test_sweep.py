"""`sweep` at the command line: what is refused before anything starts, and that nothing of others is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.cli import main

TOY = str(Path(__file__).parents[1] / "pipeline" / "toy.yaml")
ASKED = ["sweep", "--config", TOY, "--until", "pretrain"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "pretrain.optimzer.name=adamw"], 'unknown key (did you mean "pretrain.optimizer"?)'),
        (["--grid", "pretrain.optimizer.name=adamw,adam"], "trial pretrain.optimizer.name=adam: pretrain"),
        (["--grid", "data.sft=builtin,there_is_no_such.jsonl", "--until", "sft"], "trial data.sft=there_is_no_such"),
        (["--grid", "model.num_attention_heads=4,2", "--tp-size", "4"], "trial model.num_attention_heads=2: tp_size=4"),
        (["--grid", "pretrain.optimizer.lr=1e-4..1e-2"], "a range has no end of values"),
        (["--grid", "pretrain.steps=4,8", "--set", "pretrain.steps=4"], "by a flag or --set as well"),
        (["--trials", "4"], "a grid tries all its combinations"),
        (["--search", "optuna", "--trials", "4"], "a --grid to search in"),
        (["--metric", "steps"], "is less or more of it better"),
        (["--until", "export"], "nothing is learned there"),
        (["--backend", "modal"], "this machine or a Ray cluster"),
        (["--name", "a/b"], "a folder's name"),
        (["--resume", "nothing"], "--resume and --config"),
        (["--json", "nowhere/out.json"], "lies in none"),
    ],
)
def test_what_cannot_be_tried_is_refused_and_leaves_nothing(options, message, tmp_path, capsys, monkeypatch):
    if "optuna" in options:
        monkeypatch.setattr("ray_pipeline.dag.sweeps.suggestions.need_optuna", lambda: None)
    assert main([*ASKED, *options, "--output-dir", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_folders_and_files_of_others_are_not_replaced(tmp_path, capsys):
    mine = tmp_path / "mine" / "diary.txt"
    mine.parent.mkdir()
    mine.write_text("Monday")
    assert main([*ASKED, "--output-dir", str(tmp_path), "--name", "mine"]) == 2
    assert "this is not a sweep's folder" in capsys.readouterr().err
    assert main([*ASKED, "--output-dir", str(tmp_path), "--json", str(mine)]) == 2
    assert "there is another file already" in capsys.readouterr().err
    assert main(["sweep", "--resume", str(mine.parent)]) == 2
    assert "no sweep there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "diary.txt"] and mine.read_text() == "Monday"


def test_optuna_that_is_missing_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = ["--search", "optuna", "--trials", "2", "--grid", "pretrain.optimizer.lr=1e-4..1e-2"]
    assert main([*ASKED, *options, "--output-dir", str(tmp_path)]) == 2
    assert 'pip install "ray-pipeline[optuna]"' in capsys.readouterr().err

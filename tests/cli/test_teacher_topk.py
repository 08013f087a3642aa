"""`teacher-topk`: what it writes is what DISTILLATION reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.teachers.top_k import TopKRows
from tests.teachers.test_teacher_folder import other_tokenizer
from tests.training.distill_run import distil, stage_dir, teacher_run


def test_what_teacher_topk_did_not_write_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_dir, mine = teacher_run(tmp_path), tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    model = stage_dir(run_dir, "grpo") / "model"
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    for folder, said in ((mine, "holds thesis.tex"), (model, "`teacher-topk` did not write"), (run_dir, "holds ")):
        assert main(["teacher-topk", "toy", str(folder), "--k", "5", "--output-dir", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    few = tmp_path / "few"
    for _ in range(2):  # its own it does replace
        assert main(["teacher-topk", "toy", str(few), "--k", "5", "--output-dir", str(tmp_path)]) == 0


def test_a_runs_conversations_are_scored_and_learned_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_dir, folder = teacher_run(tmp_path), tmp_path / "few"
    place = ("--output-dir", str(tmp_path))
    assert main(["teacher-topk", "toy", str(folder), "--k", "5", *place]) == 0
    assert "5 log-probabilities each" in capsys.readouterr().out
    data = stage_dir(run_dir, "data_prep")
    rows = TopKRows(PackedRows(data / "sft" / "train"), data / "tokenizer", folder, 1.0)
    assert rows.batch(0, 0, 2).extras.teacher_topk_ids.shape == (2, rows.rows.seq_len, 5)
    assert distil(run_dir, "student", teacher=f"topk:{folder}", init="random", steps=1)
    assert main(["teacher-topk", "toy", str(folder), "--k", "5000", *place]) == 2
    assert "--k=5000: must be within 1..400, the vocabulary" in capsys.readouterr().err
    other = other_tokenizer(tmp_path / "other")
    for name in ("model.safetensors", "config.json"):
        (other / name).write_bytes((stage_dir(run_dir, "grpo") / "model" / name).read_bytes())
    assert main(["teacher-topk", "toy", str(folder), "--teacher", str(other), *place]) == 2
    assert "its tokenizer is not the run's" in capsys.readouterr().err

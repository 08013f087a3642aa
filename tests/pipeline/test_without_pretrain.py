"""`run --init-from FOLDER --skip pretrain` through Ray and the command line, exported and read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.dag.ledger import RunFile
from tests.pipeline.driving import TOY, finish, stages, start
from tests.stages.test_without_pretrain import published_folder

pytestmark = pytest.mark.slow


def test_a_published_folder_is_tuned_taught_and_exported_without_pretraining(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "given")
    flags = ("--init-from", str(folder), "--skip", "pretrain", "--dpo", "--no-wandb", "--seq-len", "128")
    student = '--set=distillation.student={"num_hidden_layers": 1, "num_nextn_predict_layers": 0}'
    command = ("run", "--config", str(TOY), "--run-name", "toy", "--max-steps", "4", *flags, student)
    finish(start(*command, "--set", "export.gguf=[]", folder=tmp_path), tmp_path)
    entries = stages(tmp_path, "toy")
    expected = ["data_prep", "sft", "dpo", "grpo", "distillation", "export"]
    assert list(entries) == expected == RunFile(tmp_path / "toy").chain
    assert all(entry["status"] in ("done", "learned_nothing") for entry in entries.values())
    assert entries["sft"]["baselines"].keys() == {"input_accuracy"}
    assert not (Path(entries["data_prep"]["folder"]) / "pretrain").exists()
    card = (Path(entries["export"]["folder"]) / "hf" / "README.md").read_text()
    assert "starts from" in card and "dpo steps" in card and "pretrain steps" not in card

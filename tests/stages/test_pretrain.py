"""PRETRAIN from weights of a folder: the first loss is theirs, and what is learned is held against it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.transformer import Transformer
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.packing import pack_documents
from ray_pipeline.data.rows.shards import write_rows
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.artifacts import load_model
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.stages import pretrain
from tests.settings.test_init_from import CONFIG, load, write


class HereLauncher:
    """Runs the one rank in this process."""

    def run(self, stage, function, arguments):
        return function(arguments)


def write_data(folder: Path) -> None:
    documents = [[(7 * i + 3 * j) % 50 for j in range(40)] for i in range(40)]
    for name in ("train", "validation"):
        rows = pack_documents(documents, 32, 0)
        write_rows(folder / "pretrain" / name, rows, seq_len=32, vocab_size=320, tokens_per_shard=10**6)
    (folder / "manifest.json").write_text(json.dumps({"unigram_entropy": 5.5}))


def start(folder: Path, config: PipelineFields) -> StageResult:
    write_data(folder / "data")
    settings = {"pretrain": config.pretrain.model_copy(update={"steps": 3, "batch_size": 4}), "run_name": "toy"}
    config = config.model_copy(update=settings)
    inputs = {"data_prep": StageResult(folder / "data")}
    (folder / "pretrain").mkdir()
    return pretrain.run(StageContext(config, "toy", folder, folder / "pretrain", inputs, HereLauncher()))  # type: ignore[arg-type]


def test_training_starts_from_the_folders_weights(tmp_path):
    given = write(tmp_path / "given")
    config = load(given, {"tracking.wandb": False, "pretrain.optimizer.warmup_steps": 0})
    result = start(tmp_path, config)
    before = Transformer(CONFIG)
    from ray_pipeline.training.initial import initial_state

    state = initial_state(config)
    assert state is not None
    before.load_state_dict(state)
    rows = PackedRows(tmp_path / "data" / "pretrain" / "validation")
    batch = rows.slice(0, len(rows))
    with torch.no_grad():
        logits = before.eval()(batch.tokens, batch.doc_ids)
    same = batch.doc_ids[:, 1:] == batch.doc_ids[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    assert result.baselines["input_loss"] == pytest.approx(float(losses[same].mean()), abs=1e-3)
    assert "input_loss" not in result.metrics
    assert result.metrics["validation_loss"] < result.baselines["input_loss"]
    trained = load_model(tmp_path / "pretrain" / "model").state_dict()
    assert trained.keys() == state.keys()
    assert not torch.equal(trained["lm_head.weight"], state["lm_head.weight"])


def test_a_model_that_does_not_beat_the_weights_it_was_given_learned_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "train", lambda arguments: {"validation_loss": 2.0, "input_loss": 1.9})
    config = load(write(tmp_path / "given"), {"tracking.wandb": False})
    result = start(tmp_path, config)
    assert result.learned is False
    assert result.baselines["input_loss"] == 1.9

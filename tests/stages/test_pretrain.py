"""PRETRAIN from weights of a folder: the first loss is theirs, and what is learned is held against it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.transformer import Transformer
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.packing import Row, pack_documents, pack_placed
from ray_pipeline.data.rows.shards import write_rows
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.artifacts import load_model
from ray_pipeline.records.metrics_file import read_metrics
from ray_pipeline.settings.loading import load_config
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


def write_foreign_first(folder: Path) -> None:
    """Held-out rows of two sources: first a few of tokens that nothing is trained on, then many like the trained."""
    texts = [(0, [200 + (11 * i * j) % 97 for j in range(40)]) for i in range(6)]
    texts += [(1, [(7 * i + 3 * j) % 50 for j in range(40)]) for i in range(40)]
    held: Counter[int] = Counter()

    def rows() -> Iterator[Row]:
        for row, source, _ in pack_placed(texts, 32, 0):
            held[source] += 1
            yield row

    target = folder / "pretrain" / "validation"
    shutil.rmtree(target)
    write_rows(
        target, rows(), seq_len=32, vocab_size=320, tokens_per_shard=10**6,
        sources=lambda: {("foreign", "own")[source]: count for source, count in held.items()},
    )  # fmt: skip


def start(folder: Path, config: PipelineFields, steps: int = 3) -> StageResult:
    if not (folder / "data").exists():
        write_data(folder / "data")
    settings = {"pretrain": config.pretrain.model_copy(update={"steps": steps, "batch_size": 4}), "run_name": "toy"}
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


def test_the_best_checkpoint_and_the_verdict_go_by_all_sources(tmp_path):
    """On the first source it gets worse from the first evaluation on."""
    write_data(tmp_path / "data")
    write_foreign_first(tmp_path / "data")
    changes = {"tracking.wandb": False, "pretrain.optimizer.warmup_steps": 0, "pretrain.optimizer.lr": 3e-3}
    changes |= {"pretrain.eval_every": 10, "pretrain.checkpoint_every": 10}
    config = load(write(tmp_path / "given"), changes, Path("tiny-full"))
    result = start(tmp_path, config, steps=30)
    lines = [line for line in read_metrics(tmp_path / "pretrain") if "val/validation_loss" in line]
    foreign, whole = ([line[f"val/validation_loss{name}"] for line in lines] for name in ("/foreign", ""))
    assert foreign == sorted(foreign) and foreign[0] < foreign[-1]
    assert whole == sorted(whole, reverse=True)
    assert json.loads((tmp_path / "pretrain/checkpoints/best.json").read_text())["step"] == 30
    assert result.learned and result.metrics["validation_loss"] < result.baselines["input_loss"]


def test_a_prediction_is_held_against_the_same_text_alone(tmp_path):
    held = "ab" * 32
    shas = {"tokens": held, "mask": "cd" * 32}
    files = {f"pretrain/validation/00000.{field}.bin": {"sha256": sha} for field, sha in shas.items()}
    manifest = {"unigram_entropy": 5.5, "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    inputs = {"data_prep": StageResult(tmp_path)}

    def of(given: dict[str, str | float] | None) -> dict[str, float]:
        config = load_config(None, {"pretrain.prediction": given})
        return pretrain.prediction(StageContext(config, "toy", tmp_path, tmp_path, inputs, HereLauncher()))  # type: ignore[arg-type]

    assert of(None) == {}
    assert of({"loss": 2.5, "text": "mine.txt", "validation": held}) == {"predicted_loss": 2.5}
    assert of({"loss": 2.5, "text": "mine.txt", "validation": "ef" * 32}) == {"predicted_loss_elsewhere": 2.5}

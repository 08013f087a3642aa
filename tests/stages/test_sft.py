"""SFT as a stage: adapters and noise in any layout, and a broken stage ends with the same weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_pipeline.dag.ledger import RunFile
from ray_pipeline.data.rows.batch import IGNORE
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.launch.launchers import InlineLauncher, ProcessLauncher
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.artifacts import load_model, weights_digest
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.stages import sft
from ray_pipeline.stages.verdict import judge_conversations
from ray_pipeline.training.batch_source import PackedSource
from tests.cli.made_run import SEQ_LEN, TOY, make_run

LORA = {"r": 4, "dropout": 0.1, "target_modules": ["q_a_proj", "o_proj"]}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose PRETRAIN is finished."""
    return make_run(tmp_path_factory.mktemp("runs"), models=("pretrain",))


def stage_folder(run_dir: Path, stage: str) -> Path:
    return run_dir / RunFile(run_dir).stages[stage]["folder"]


def train(run_dir: Path, name: str, *, layout: dict[str, Any] | None = None, **settings: Any) -> StageResult:
    """Train six steps into `run_dir/name`."""
    chosen = {
        "steps": 6, "batch_size": 4, "eval_every": 10, "checkpoint_every": 2, "log_every": 1,
        "optimizer": {"name": "sgd", "warmup_steps": 0, "lr": 0.1},
    } | settings  # fmt: skip
    config = PipelineFields.model_validate(
        {
            "model": asdict(TOY), "layout": {"micro_batch": 1, **(layout or {})}, "sft": chosen, "run_name": "toy",
            "stages": ["data_prep", "pretrain", "sft", "export"], "tracking": {"wandb": False},
            "data": {"seq_len": SEQ_LEN}, "evaluation": {"questions": 1, "max_new_tokens": 4},
        }
    )  # fmt: skip
    inputs = {stage: StageResult(stage_folder(run_dir, stage)) for stage in ("data_prep", "pretrain")}
    (run_dir / name).mkdir(exist_ok=True)
    launcher: Any = InlineLauncher() if layout is None else ProcessLauncher(2)
    return sft.run(StageContext(config, "toy", run_dir, run_dir / name, inputs, launcher))


def learn(run_dir: Path, name: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Train as `train` does; the weights that are left."""
    train(run_dir, name, **settings)
    return load_model(run_dir / name / "model").state_dict()


def test_the_held_out_loss_is_held_against_the_inputs(run_dir):
    result = train(run_dir, "judged")
    rows = PackedRows(stage_folder(run_dir, "data_prep") / "sft" / "validation")
    batch = rows.slice(0, len(rows))
    with torch.no_grad():
        logits = load_model(stage_folder(run_dir, "pretrain") / "model").eval()(batch.tokens, batch.doc_ids)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    assert result.baselines["input_loss"] == pytest.approx(float(expected), rel=1e-6)
    assert result.metrics["validation_loss"] < result.baselines["input_loss"]
    assert "input_loss" not in result.metrics


@pytest.mark.parametrize(
    ("source", "accuracy", "loss", "learned"),
    [
        ("builtin", 0.30, 1.0, True),
        ("builtin", 0.20, 1.0, False),  # it imitates better, and answers no better
        ("chats.jsonl", 0.20, 1.0, True),
        ("builtin_of_mine.jsonl", 0.20, 1.0, True),
        ("chats.jsonl", 0.20, 1.995, False),
        ("chats.jsonl", 0.30, 2.5, True),
    ],
)
def test_conversations_of_ones_own_may_teach_what_no_question_asks(tmp_path, source, accuracy, loss, learned):
    config = PipelineFields.model_validate({"data": {"sft": source}, "evaluation": {"min_gain": 0.01}})
    context = StageContext(config, "toy", tmp_path, tmp_path, {}, InlineLauncher())
    figures = {"accuracy": accuracy, "input_accuracy": 0.2, "validation_loss": loss, "input_loss": 2.0}
    result = judge_conversations(context, figures)
    assert result.learned is learned
    assert result.baselines == {"input_accuracy": 0.2, "input_loss": 2.0}
    assert result.metrics == {"accuracy": accuracy, "validation_loss": loss}


def test_the_model_is_the_input_with_adapters_merged_and_they_lie_beside_it(run_dir):
    before = load_model(stage_folder(run_dir, "pretrain") / "model").state_dict()
    after = learn(run_dir, "adapters", lora=LORA)
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.split(".")[-2] in LORA["target_modules"]}
    files = {path.name for path in (run_dir / "adapters" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files


def test_noise_changes_training_and_nothing_else(run_dir):
    plain, noisy = learn(run_dir, "plain"), learn(run_dir, "noisy", neftune_alpha=5.0)
    assert plain.keys() == noisy.keys()
    assert any(not torch.equal(weight, plain[name]) for name, weight in noisy.items())
    assert not (run_dir / "plain" / "adapter").exists()


def test_broken_it_resumes_to_the_same_weights_with_noise_and_dropout(run_dir, monkeypatch):
    learn(run_dir, "unbroken", lora=LORA, neftune_alpha=5.0)
    batch, struck = PackedSource.batch, []

    def dies(self, step):
        if step == 5 and not struck:
            struck.append(step)
            raise ZeroDivisionError
        return batch(self, step)

    monkeypatch.setattr(PackedSource, "batch", dies)
    with pytest.raises(ZeroDivisionError):
        learn(run_dir, "broken", lora=LORA, neftune_alpha=5.0)
    learn(run_dir, "broken", lora=LORA, neftune_alpha=5.0)
    assert struck
    assert weights_digest(run_dir / "broken" / "model") == weights_digest(run_dir / "unbroken" / "model")


LAYOUTS = [
    {"pp_size": 2}, {"dp_size": 2}, {"sp_size": 2}, {"dp_size": 2, "ep_size": 2}, {"dp_size": 2, "zero_stage": 3},
]  # fmt: skip


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS[1:])], ids=str
)
def test_any_layout_learns_the_same(run_dir, layout):
    one = learn(run_dir, "one", lora=LORA, neftune_alpha=5.0)
    name = "-".join(layout)
    two = learn(run_dir, name, layout=layout, lora=LORA, neftune_alpha=5.0)
    for key, weight in two.items():
        torch.testing.assert_close(weight, one[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k} {m}")

"""Every mechanism is one setting: it trains 50 steps in the pipeline, learns, and the model it leaves generates."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.records.metrics_file import read_metrics
from tests.pipeline.driving import finish, stages, start

STEPS = 50
MECHANISMS = {
    "dsa": "model.attention=dsa",
    "mha": "model.attention=mha",
    "gqa": "model.attention=gqa",
    "mqa": "model.attention=mqa",
    "sliding": "model.attention=sliding",
    "cope": "model.position=cope",
    "dyt": "model.norm=dyt",
    "recursion": "model.recursion_depth=2",
    "residual-scales": "model.residual_scales=true",
    "value-embeddings": "model.value_embeddings=true",
    "aux-loss": "model.aux_loss_alpha=0.01",
    "softmax": "model.topk_method=greedy",
    "two-drafts": "model.num_nextn_predict_layers=2",
    "muon": "pretrain.optimizer.name=muon",
    "bf16": "pretrain.precision=bf16",
    "fp8": "pretrain.precision=fp8",
}
# Small data; recursion cannot be cut into pipeline stages, so one rank.
COMMON = (
    "--config", "tiny", "--gpus", "1", "--no-wandb", "--max-steps", str(STEPS), "--backend", "cpu",
    "--set", "data.builtin_documents=2000", "--set", "data.builtin_conversations=200",
    "--set", "data.builtin_prompts=50", "--set", "pretrain.log_every=1", "--set", "pretrain.batch_size=8",
    "--set", "layout.micro_batch=8",
)  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanism_trains_in_the_pipeline_and_generates(tmp_path, name):
    arguments = ("run", "--run-name", name, *COMMON, "--until", "pretrain", "--set", MECHANISMS[name])
    finish(start(*arguments, folder=tmp_path), tmp_path)
    lines = read_metrics(Path(stages(tmp_path, name)["pretrain"]["folder"]))
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1
    log = tmp_path / "output.log"
    before = len(log.read_text())
    assert finish(start("generate", name, "One day ", "--max-new-tokens", "20", folder=tmp_path), tmp_path) == 0
    assert len(log.read_text()[before:].strip()) > len("One day ")

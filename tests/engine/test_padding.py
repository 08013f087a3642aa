"""Padding counts in nothing: a padded batch takes the step of the one without, whatever lies in the padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import IGNORE, Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.engine.row_noise import disturb_embeddings, seed_rows
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from tests.engine.test_parity import CONFIG, make_batch

SGD = OptimizerConfig(name="sgd", lr=0.5, warmup_steps=0, grad_clip=0.5)
STEPS = 3
BALANCED = {"aux_loss_alpha": 0.5, "router_bias_update_rate": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "sequence": BALANCED,
    "batch": BALANCED | {"seq_aux": False},
    "two modules ahead": BALANCED | {"num_nextn_predict_layers": 2},
    "recursion": BALANCED | {"recursion_depth": 2},
    "indexer": BALANCED | {"attention": "dsa", "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
}


def config_of(kind: str) -> ModelConfig:
    return replace(CONFIG, **KINDS[kind])


def train(config: ModelConfig, batches: list[Batch], micro_batch: int = 2, **options: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    engine = Engine(config, Mesh(MeshSizes()), EngineOptions(optimizer=SGD, micro_batch=micro_batch, **options))
    stats, loads = [], []
    for batch in batches:
        stats.append(engine.train_step(batch, CrossEntropy(0.3), SGD.lr))
        loads.append({name: load.clone() for name, load in engine.expert_loads.items()})
    return {
        "losses": [s.loss for s in stats], "norms": [s.grad_norm for s in stats], "figures": [s.figures for s in stats],
        "loads": loads, "weights": engine.full_state(),
    }  # fmt: skip


def longer(batch: Batch, more: int, seed: int) -> Batch:
    """The same documents in rows with an empty end, in which lies whatever the seed says."""
    rows, length = batch.tokens.shape
    end = torch.randint(0, CONFIG.vocab_size, (rows, more), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones_like(end)
    return Batch(
        torch.cat([batch.tokens, end], 1), torch.cat([batch.labels, IGNORE * ones], 1),
        torch.cat([batch.doc_ids, 2 * ones], 1), real=torch.arange(length + more).expand(rows, -1) < length,
    )  # fmt: skip


def assert_equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    torch.testing.assert_close(got["losses"], want["losses"], rtol=2e-6, atol=0)
    torch.testing.assert_close(got["norms"], want["norms"], rtol=1e-4, atol=0)
    for mine, other in zip(got["loads"], want["loads"], strict=True):
        for name, load in other.items():
            assert torch.equal(mine[name], load), name
    for mine, other in zip(got["figures"], want["figures"], strict=True):
        assert mine.keys() == other.keys() and other["moe/dropped_tokens"] == 0
        torch.testing.assert_close(list(mine.values()), list(other.values()), rtol=1e-5, atol=1e-7)
    for name, tensor in got["weights"].items():
        torch.testing.assert_close(
            tensor, want["weights"][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Any]]:
    return {kind: train(config_of(kind), [make_batch(step, rows=5) for step in range(STEPS)]) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_end_of_a_row_counts_in_nothing(plain, kind):
    padded = [longer(make_batch(step, rows=5), 7, seed=step) for step in range(STEPS)]
    assert_equal(train(config_of(kind), padded), plain[kind])
    assert_equal(train(config_of(kind), padded, micro_batch=5, activation_checkpointing="full"), plain[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_added_rows_count_in_nothing(plain, kind):
    padded = [make_batch(step, rows=5).pad_rows(8) for step in range(STEPS)]
    assert_equal(train(config_of(kind), padded), plain[kind])


def test_a_batch_that_says_all_is_real_takes_the_same_step_bit_for_bit(plain):
    batches = [make_batch(step, rows=5) for step in range(STEPS)]
    said = [replace(batch, real=torch.ones_like(batch.tokens, dtype=torch.bool)) for batch in batches]
    got = train(config_of("sequence"), said)
    assert got["losses"] == plain["sequence"]["losses"]
    for name, tensor in got["weights"].items():
        assert torch.equal(tensor, plain["sequence"]["weights"][name])


def test_padding_has_no_noise_and_makes_none_weaker():
    batch = make_batch(0, rows=2)
    quiet = disturb_embeddings(seed_rows(batch, 0, 0), 5.0, 32).extras.noise_scale
    padded = disturb_embeddings(seed_rows(longer(batch, 7, seed=0), 0, 0), 5.0, 32).extras.noise_scale
    assert torch.equal(padded[:, :16], quiet)
    assert (padded[:, 16:] == 0).all()

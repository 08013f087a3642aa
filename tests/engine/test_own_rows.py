"""Replicas that read their own rows alone take the steps of one process that reads them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.packing import pack_documents
from ray_pipeline.data.rows.shards import write_rows
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.training.batch_source import PackedSource, SeededSource
from tests.distributed import run_ranks
from tests.engine.test_balance_layouts import SGD
from tests.engine.test_parity import CONFIG

ROWS, SEED, STEPS = 8, 3, 3
LAYOUTS: dict[str, tuple[MeshSizes, dict[str, Any]]] = {
    "dp4": (MeshSizes(dp=4), {}),
    "dp2-pp2": (MeshSizes(dp=2, pp=2), {"schedule": "zbv"}),
    "dp2-tp2-ep2": (MeshSizes(dp=2, tp=2, ep=2), {}),
    "dp2-sp2-zero2": (MeshSizes(dp=2, sp=2), {"zero_stage": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that hold very different numbers of documents and of padding."""
    draw = np.random.default_rng(0)
    documents = [draw.integers(1, 64, int(draw.integers(2, 40))).tolist() for _ in range(60)]
    path = tmp_path_factory.mktemp("rows")
    write_rows(path, pack_documents(documents, 16, 0), seq_len=16, vocab_size=64, tokens_per_shard=200)
    return path


def train(folder: Path, sizes: MeshSizes, options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    mesh = Mesh(sizes)
    engine = Engine(CONFIG, mesh, EngineOptions(optimizer=SGD, micro_batch=2, **options))
    rows = PackedSource(PackedRows(folder), SEED, ROWS, mesh.replica)
    source, objective = SeededSource(rows, SEED, neftune_alpha=2.0, hidden_size=CONFIG.hidden_size), CrossEntropy(0.3)
    stats = [engine.train_step(source.batch(step), objective, SGD.lr) for step in range(STEPS)]
    held_out = engine.evaluate(rows.batch(STEPS), objective)
    return {
        "read": [len(source.batch(step)) for step in range(STEPS)],
        "counts": [(step.weight, step.tokens) for step in stats] + [(held_out.weight, 0)],
        "losses": [step.loss for step in stats] + [held_out.loss],
        "weights": engine.full_state(),
    }


def train_all(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    return {name: train(folder, *LAYOUTS[name]) for name in LAYOUTS}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return train(folder, MeshSizes(), {})


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(train_all, 4, folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_reads_its_replicas_rows_and_all_take_one_process_steps(alone, outcomes, name):
    assert len({count for count, _ in alone["counts"]}) > 2, "batches of different numbers of trained tokens"
    for rank in outcomes:
        got = rank[name]
        assert got["read"] == [ROWS // LAYOUTS[name][0].dp] * STEPS and alone["read"] == [ROWS] * STEPS
        assert got["counts"] == alone["counts"]
        torch.testing.assert_close(got["losses"], alone["losses"], rtol=2e-6, atol=0)
        for key, tensor in alone["weights"].items():
            torch.testing.assert_close(got["weights"][key], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: k + m)


def test_the_shares_of_all_replicas_are_the_batch_in_its_order(folder):
    rows = PackedRows(folder)
    whole = SeededSource(PackedSource(rows, SEED, ROWS), SEED, neftune_alpha=2.0, hidden_size=8).batch(1)
    sources = (PackedSource(rows, SEED, ROWS, (index, 4)) for index in range(4))
    parts = [SeededSource(one, SEED, neftune_alpha=2.0, hidden_size=8).batch(1) for one in sources]
    assert [part.start for part in parts] == [0, 2, 4, 6] and whole.start is None
    for name in ("tokens", "labels", "doc_ids", "real"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    for name, values in whole.extras.given().items():
        assert torch.equal(torch.cat([part.extras.given()[name] for part in parts]), values)


def test_rows_that_replicas_do_not_divide_are_refused(folder):
    with pytest.raises(ValueError, match="a batch of 8 rows cannot be split over dp=3 replicas"):
        PackedSource(PackedRows(folder), SEED, ROWS, (0, 3))

"""Noise on the embeddings (NEFTune): a function of seed, step and row alone, in training alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.engine.row_noise import disturb_embeddings, embedding_noise, seed_rows
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, SGD, Outcome, assert_equal, case, make_batch, train, train_all

ALPHA, WIDTH = 5.0, CONFIG.hidden_size
CASES = [
    case(pp=2, optimizer="sgd"), case(pp=2, schedule="zbv", optimizer="sgd"), case(dp=2, optimizer="sgd"),
    case(sp=2, optimizer="sgd"), case(tp=2, optimizer="sgd"), case(dp=2, zero_stage=2, optimizer="sgd"),
    case(dp=2, optimizer="sgd", activation_checkpointing="full"),
]  # fmt: skip


def noisy(step: int, alpha: float = ALPHA, seed: int = 0) -> Batch:
    return disturb_embeddings(seed_rows(make_batch(step), seed, step), alpha, WIDTH)


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return run_ranks(train_all, 2, CASES, noisy)[0]


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return train(case(optimizer="sgd"), batches=noisy)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(c) for c in CASES])
def test_every_layout_sees_the_noise_of_one_process(outcomes, alone, index):
    assert_equal(outcomes[index], alone, CASES[index])


def test_noise_is_uniform_within_the_papers_bound_and_new_in_every_row_step_and_seed():
    batch = noisy(0)
    noise = embedding_noise(batch, WIDTH)
    lengths = (batch.doc_ids[:, :, None] == batch.doc_ids[:, None]).sum(-1)
    bound = ALPHA / (lengths * WIDTH).sqrt()
    assert noise.shape == (8, 16, WIDTH) and (noise.abs() <= bound[:, :, None]).all()
    unit = noise / bound[:, :, None]
    assert abs(float(unit.mean())) < 0.05 and abs(float(unit.square().mean()) - 1 / 3) < 0.02
    others = [noisy(1), noisy(0, seed=1)]
    drawn = [unit, *(embedding_noise(o, WIDTH) / o.extras.noise_scale.unsqueeze(-1) for o in others)]
    rows = torch.cat(drawn).flatten(1)
    assert len({tuple(row[:4].tolist()) for row in rows}) == 24


@given(cut=st.integers(1, 15))
def test_a_documents_noise_is_as_strong_packed_as_alone(cut):
    doc_ids = (torch.arange(16)[None] >= cut).long()
    rows = Batch(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long), doc_ids)
    scale = disturb_embeddings(rows, 3.0, 4).extras.noise_scale[0]
    want = [3.0 / math.sqrt(cut * 4)] * cut + [3.0 / math.sqrt((16 - cut) * 4)] * (16 - cut)
    torch.testing.assert_close(scale, torch.tensor(want))


def test_evaluation_has_no_noise_and_a_step_has():
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=SGD))
    noisy_loss, plain_loss = (engine.evaluate(b, CrossEntropy(0.3)).loss for b in (noisy(0), make_batch(0)))
    assert noisy_loss == plain_loss
    assert engine.train_step(noisy(0), CrossEntropy(0.3), 0.0).loss != plain_loss
    silent, none = (
        Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=SGD)).train_step(batch, CrossEntropy(0.3), 0.0).loss
        for batch in (noisy(0, alpha=0.0), make_batch(0))
    )
    assert silent == none


def test_padding_rows_have_no_noise():
    padded = noisy(0).pad_rows(10)
    noise = embedding_noise(padded, WIDTH)
    assert (noise[8:] == 0).all() and torch.equal(noise[:8], embedding_noise(noisy(0), WIDTH))

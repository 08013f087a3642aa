"""A replica's rows of pairs, rollouts and a teacher's view are what it would have computed of the whole batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.engine.own_rows import own_rows, share_of
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, SGD, make_batch

LAYOUTS = {
    "dp4": (MeshSizes(dp=4), "1f1b"),
    "dp2-tp2": (MeshSizes(dp=2, tp=2), "1f1b"),
    "dp2-pp2-dualpipev": (MeshSizes(dp=2, pp=2), "dualpipev"),
}
ROWS = 3  # so that replicas have rows of padding, and of four replicas one has nothing else


def global_batch() -> Batch:
    batch = make_batch(0, rows=ROWS)
    values = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(batch.tokens, dtype=torch.bool)  # as every source has it
    return replace(batch, extras=replace(batch.extras, advantages=values), real=real)


def steps(rank: int) -> dict[str, dict]:
    out = {}
    for name, (sizes, schedule) in LAYOUTS.items():
        torch.set_num_threads(1)
        found = []
        for own in (False, True):
            engine = Engine(CONFIG, Mesh(sizes), EngineOptions(optimizer=SGD, micro_batch=2, schedule=schedule))
            batch = own_rows(engine, global_batch()) if own else engine.fitted(global_batch())
            share = share_of(engine, ROWS, batch.tokens.shape[1])
            if own:
                assert (batch.start, len(batch)) == (share.start, share.stop - share.start)
                held = batch.tokens.untyped_storage().nbytes() // batch.tokens[0].nbytes
                assert held <= len(batch) + 1, "rows of other replicas are let go, but for one that padding repeats"
                assert engine.fitted(batch) is batch
            values = engine.per_token(batch, lambda model, hidden, _, rows: hidden)
            values = None if values is None else values if own else values[share]
            stats = engine.train_step(batch, CrossEntropy(0.3), SGD.lr)
            mine = batch if own else batch.rows(share.start, share.stop)
            found.append((stats.loss, stats.grad_norm, stats.weight, values, mine.extras.advantages, mine.real))
        out[name] = found
    return out


@pytest.fixture(scope="module")
def outcomes() -> list[dict]:
    return run_ranks(steps, 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_own_rows_train_and_measure_as_the_whole_batch_does(outcomes, name):
    for rank in outcomes:
        whole, own = rank[name]
        assert own[:3] == whole[:3]
        for mine, theirs in zip(own[3:], whole[3:], strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
    if name == "dp4":
        assert not outcomes[3][name][1][5].any(), "the last replica has padding alone"

"""What a step tells of its metrics: means over the tokens that each of them was measured on."""

from __future__ import annotations

import pytest

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from tests.engine.test_parity import CONFIG, make_batch


def test_mtp_has_its_mean_over_the_tokens_it_predicts_and_none_where_it_is_not_trained():
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OptimizerConfig(), row_length=16))
    batch = make_batch(0)
    apart = engine.evaluate(batch, CrossEntropy(0.0)).metrics  # modules are measured there, and not trained
    stats = engine.train_step(batch, CrossEntropy(0.3), lr=0.0)
    means = stats.means()
    assert 0 < apart["mtp/tokens"] < stats.weight  # fewer tokens have one two places ahead
    assert means["cross_entropy"] == pytest.approx(apart["cross_entropy"] / stats.weight, rel=1e-6)
    assert means["mtp/cross_entropy"] == pytest.approx(apart["mtp/cross_entropy"] / apart["mtp/tokens"], rel=1e-6)
    assert means.keys() == {"cross_entropy", "mtp/cross_entropy"}
    assert engine.train_step(batch, CrossEntropy(0.0), lr=0.0).means().keys() == {"cross_entropy"}

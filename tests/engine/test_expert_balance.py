"""What is reported of experts' loads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.expert_balance import ExpertBalance
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from tests.engine.test_parity import CONFIG, make_batch


def balance(changes: dict | None = None) -> ExpertBalance:
    config = replace(CONFIG, n_routed_experts=4, num_experts_per_tok=2, **(changes or {}))
    return ExpertBalance(config, [], Mesh(MeshSizes()))


def test_routers_are_listed_with_the_times_a_token_passes_them():
    named = balance({"recursion_depth": 3}).all_routers()
    assert named == {f"layers.{i}.mlp.gate.": (0, 3) for i in (1, 2, 3)} | {"mtp.0.block.mlp.gate.": (1, 1)}
    assert not balance({"first_k_dense_replace": 99}).all_routers()


def test_entropy_is_one_where_all_are_equal_and_the_worst_layer_is_told():
    found = balance()
    found.loads = {
        "layers.1.mlp.gate.": torch.tensor([8, 8, 8, 8]),
        "layers.2.mlp.gate.": torch.tensor([16, 16, 0, 0]),
        "layers.3.mlp.gate.": torch.tensor([20, 4, 4, 4]),
        "mtp.0.block.mlp.gate.": torch.tensor([0, 0, 0, 0]),  # it did not run
    }
    figures = found.figures(found.measured([16, 15]).tolist())
    assert figures["moe/layers.1/load_entropy"] == pytest.approx(1) == figures["moe/layers.1/largest_load"]
    assert figures["moe/layers.2/load_entropy"] == pytest.approx(math.log(2) / math.log(4))
    assert figures["moe/largest_load"] == figures["moe/layers.3/largest_load"] == pytest.approx(2.5)
    assert figures["moe/load_entropy"] == pytest.approx(0.5) and figures["moe/dropped_tokens"] == 0
    assert not any("mtp" in name for name in figures)


def test_a_lost_token_is_our_own_mistake():
    found = balance({"num_nextn_predict_layers": 0})
    found.loads = {f"layers.{i}.mlp.gate.": torch.tensor([8, 8, 8, 7]) for i in (1, 2, 3)}
    with pytest.raises(AssertionError, match="3 choices of a token reached no expert"):
        found.figures(found.measured([16, 15]).tolist())


def test_a_model_without_experts_reports_nothing_of_them():
    config = replace(CONFIG, first_k_dense_replace=99)
    engine = Engine(config, Mesh(MeshSizes()), EngineOptions(optimizer=OptimizerConfig(), micro_batch=8))
    assert engine.train_step(make_batch(0), CrossEntropy(), 1e-3).figures == {}


@pytest.mark.parametrize("kept", ["e_score_correction_bias", "expert_fraction"])
def test_what_routers_learned_goes_with_the_state_and_only_the_bias_with_the_model(kept):
    changes = {"aux_loss_alpha": 0.1, "seq_aux": False}
    engines = [
        Engine(
            replace(CONFIG, **changes),
            Mesh(MeshSizes()),
            EngineOptions(optimizer=OptimizerConfig(), micro_batch=8, seed=seed),
        )
        for seed in (0, 1)
    ]
    engines[0].train_step(make_batch(0), CrossEntropy(), 1e-3)
    name = f"layers.1.mlp.gate.{kept}"
    state = {key: tensor.clone() for key, tensor in engines[0].state().items()}
    assert bool(state[f"model.{name}"].any())
    engines[1].load_state(state)
    assert torch.equal(getattr(engines[1].routers["layers.1.mlp.gate."], kept), state[f"model.{name}"])
    assert (name in engines[0].full_state()) == (kept == "e_score_correction_bias")
    losses = [engine.train_step(make_batch(1), CrossEntropy(), 1e-3).figures["aux_loss"] for engine in engines]
    assert losses[0] == losses[1]

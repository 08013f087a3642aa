"""Rows on their way to experts: what routing reaches, counted over every choice there is."""

from __future__ import annotations

from itertools import combinations

import pytest

from model.config import ModelConfig
from ray_pipeline.costs.expert_rows import hops, reached
from ray_pipeline.costs.workload import Workload
from ray_pipeline.layout.layout import Layout


def every_choice(model: ModelConfig) -> list[tuple[int, ...]]:
    """The experts of a token in every way that the router allows."""
    group = model.n_routed_experts // model.n_group
    return [
        experts
        for allowed in combinations(range(model.n_group), model.topk_group)
        for experts in combinations([g * group + i for g in allowed for i in range(group)], model.num_experts_per_tok)
    ]


def routed(experts: int, k: int, groups: int = 1, allowed: int = 1) -> ModelConfig:
    return ModelConfig(n_routed_experts=experts, num_experts_per_tok=k, n_group=groups, topk_group=allowed)


@pytest.mark.parametrize("places", [1, 2, 4, 8])
@pytest.mark.parametrize("model", [routed(8, 2), routed(8, 3), routed(8, 2, 4, 2), routed(8, 3, 2, 1)], ids=str)
def test_places_are_reached_as_often_as_by_every_choice_in_turn(model: ModelConfig, places: int) -> None:
    each, choices = model.n_routed_experts // places, every_choice(model)
    found = sum(len({expert // each for expert in experts}) for experts in choices)
    assert reached(model, places) == pytest.approx(found / len(choices), rel=1e-12)


def test_places_that_cut_through_groups_are_reached_as_often_too() -> None:
    model = routed(12, 2, groups=4, allowed=2)  # six places of two experts, four groups of three
    choices = every_choice(model)
    found = sum(len({expert // 2 for expert in experts}) for experts in choices)
    assert reached(model, 6) == pytest.approx(found / len(choices), rel=1e-12)


def test_groups_that_routing_takes_no_notice_of_limit_nothing() -> None:
    greedy = ModelConfig(n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=1, topk_method="greedy")
    assert reached(greedy, 4) == reached(routed(8, 3), 4)


def at(node: int, **axes: int) -> Workload:
    layout = Layout(gpus=axes.get("dp", 1) * axes.get("tp", 1), **axes)
    return Workload("pretrain", routed(8, 2), layout, rows=8, seq_len=64, micro_batch=1, steps=1, node=node)


def test_tensor_parallel_ranks_share_the_tokens_out_and_each_needs_all_of_them() -> None:
    [alone], [shared] = hops(at(16, dp=4, ep=4)), hops(at(16, dp=4, ep=4, tp=2))
    assert (alone.ranks, alone.tokens, shared.ranks, shared.tokens) == (4, 64, 8, 32)
    assert shared.rows == 2 * alone.rows / 2 * 1


def test_between_nodes_a_token_goes_once_and_a_node_that_is_cut_through_is_none() -> None:
    far, near = hops(at(2, dp=4, ep=4))
    [flat] = hops(at(3, dp=4, ep=4))
    assert (far.axis, far.ranks, far.rows) == ("ep, nodes", 2, 64 * reached(routed(8, 2), 2))
    assert (near.axis, near.ranks, near.tokens, near.rows) == ("ep", 2, far.rows, flat.rows)
    assert hops(at(2, dp=4)) == []

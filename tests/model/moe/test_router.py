"""Routers against transformers' of DeepSeek-V2 and V3, and what they make of the load."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.layers.auxiliary import Counting, LayerLosses
from model.moe.router import Router

HIDDEN = 24
METHODS = ("noaux_tc", "greedy", "group_limited_greedy")


def build(**changes) -> Router:
    """A router with random weights and, where it has one, a random bias."""
    router = Router(ModelConfig(hidden_size=HIDDEN, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.3)
        if router.has_bias:
            router.e_score_correction_bias.copy_(0.2 * torch.randn(router.weight.shape[0], generator=generator))
    return router


def tokens(count: int = 64) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1))


def spread(router: Router, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[tokens, experts]: the order among a token's experts is free."""
    return torch.zeros(len(indices), router.config.n_routed_experts).scatter_(1, indices, weights)


GROUPS = {
    "8 experts": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "8 in 4 groups": {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
    "256 in 8 groups": {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("normalised", [True, False])
def test_the_default_router_is_transformers_deepseek_v3(groups, normalised):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    more = {**GROUPS[groups], "norm_topk_prob": normalised, "routed_scaling_factor": 2.5}
    ours = build(**more)
    hf = {"n_group": 1, "topk_group": 1, **more, "num_local_experts": more["n_routed_experts"], "hidden_size": HIDDEN}
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(**hf))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    _, weights, indices = theirs(tokens())
    got = spread(ours, *ours(tokens()))
    torch.testing.assert_close(got, spread(ours, indices, weights), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_softmax_routers_are_transformers_deepseek_v2(groups, method):
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    more = {**GROUPS[groups], "topk_method": method, "routed_scaling_factor": 16.0}
    ours = build(**more, scoring_func="softmax", norm_topk_prob=False)
    hf = {"n_group": 1, "topk_group": 1, **more, "hidden_size": HIDDEN, "num_attention_heads": 4}
    config = DeepseekV2Config(**hf)
    config.num_experts = more["n_routed_experts"]
    theirs = DeepseekV2TopkRouter(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    _, weights, indices = theirs(tokens())
    torch.testing.assert_close(spread(ours, *ours(tokens())), spread(ours, indices, weights), rtol=1e-6, atol=1e-7)


ROUTERS = st.fixed_dictionaries(
    {
        "topk_method": st.sampled_from(METHODS),
        "scoring_func": st.sampled_from(["sigmoid", "softmax"]),
        "norm_topk_prob": st.booleans(),
        "n_group": st.sampled_from([1, 2, 4]),
        "num_experts_per_tok": st.integers(1, 4),
        "n_routed_experts": st.sampled_from([8, 16]),
    }
)


@given(ROUTERS, st.data())
def test_every_choice_is_of_different_experts_in_allowed_groups(settings, data):
    per_group = settings["n_routed_experts"] // settings["n_group"]
    least = -(-settings["num_experts_per_tok"] // per_group)
    kept = data.draw(st.integers(least, settings["n_group"]))
    router = build(**settings, topk_group=kept)
    router.config.validate()
    indices, weights = router(tokens())
    assert all(len(set(row)) == settings["num_experts_per_tok"] for row in indices.tolist())
    if settings["topk_method"] != "greedy":
        assert all(len({index // per_group for index in row}) <= kept for row in indices.tolist())
    if settings["norm_topk_prob"]:
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    scores = tokens() @ router.weight.t()
    scores = scores.sigmoid() if settings["scoring_func"] == "sigmoid" else scores.softmax(-1)
    ratios = weights / scores.gather(1, indices)  # the mixing weights never see the bias
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-4, atol=0)


def test_groups_limit_the_number_of_experts_but_of_greedy():
    few = {"n_routed_experts": 8, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}
    ModelConfig(**few, topk_method="greedy").validate()
    for method in ("noaux_tc", "group_limited_greedy"):
        with pytest.raises(ValueError, match="num_experts_per_tok=3: only 2 experts can be chosen"):
            ModelConfig(**few, topk_method=method).validate()
    with pytest.raises(ValueError, match="num_experts_per_tok=9: only 8 experts"):
        ModelConfig(num_experts_per_tok=9, topk_method="greedy").validate()


@pytest.mark.parametrize("method", METHODS)
def test_only_noaux_tc_has_a_bias_and_every_router_starts_counting_anew(method):
    router = build(topk_method=method).train()
    router(tokens())
    assert router.load.sum() == 64 * 2
    load = router.load.double()
    before = router.e_score_correction_bias.clone() if method == "noaux_tc" else None
    router.balance()
    assert (router.load == 0).all()
    assert ("e_score_correction_bias" in router.state_dict()) == (method == "noaux_tc")
    if before is not None:
        assert ((router.e_score_correction_bias > before) == (load < load.mean())).all()


def test_the_share_of_the_step_before_is_kept_and_is_not_part_of_the_model():
    router = build(aux_loss_alpha=0.1, seq_aux=False, topk_method="greedy").train()
    assert "expert_fraction" not in router.state_dict() and (router.expert_fraction == 0).all()
    router(tokens())
    load = router.load.float()
    router.balance()
    torch.testing.assert_close(router.expert_fraction, load / load.sum())
    kept = router.expert_fraction.clone()
    router.balance()  # a step in which the router did not run
    assert torch.equal(router.expert_fraction, kept)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_changes_no_output_and_counts_only_in_training(method):
    router = build(topk_method=method, aux_loss_alpha=0.1).train()
    indices, weights = router(tokens())
    sums = LayerLosses(1.0)
    with_loss = router(tokens(), rows=4, counting=Counting(losses=sums))
    with torch.no_grad():
        router(tokens(), rows=4, counting=Counting(losses=sums))
    assert torch.equal(with_loss[0], indices) and torch.equal(with_loss[1], weights)
    total, count = sums.pair("aux_loss")
    assert count == 64 and 0.5 * 64 < total < 8 * 64


def test_v3s_loss_counts_what_the_scores_choose_and_not_what_the_bias_makes_of_it():
    router = build(aux_loss_alpha=1.0).train()
    sums = []
    for scale in (0.0, 100.0):
        router.e_score_correction_bias.mul_(scale)
        found = LayerLosses(1.0)
        router(tokens(), rows=4, counting=Counting(losses=found))
        sums.append(found.pair("aux_loss"))
        router.e_score_correction_bias.copy_(torch.arange(8.0))
    assert sums[0] == sums[1]

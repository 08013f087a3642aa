"""Experts that are given in place of a choice: used with the weights of the scores as they are, counted, trained."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.config import ModelConfig
from model.moe.replay import FREE, columns, routed_layers
from model.moe.router import Router
from model.transformer import Transformer
from tests.model.generate.models import TINY, build

GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 1, "hidden_size": 24}


def router(**changes) -> Router:
    out = Router(ModelConfig(**{**GROUPED, **changes}))
    torch.nn.init.normal_(out.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return out


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_given_experts_have_the_weights_of_their_scores_and_gradients_flow(scoring):
    gate = router(scoring_func=scoring, routed_scaling_factor=2.5)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
    given = torch.tensor([[7, 0], [1, 2], [FREE, FREE], [3, 4], [FREE, FREE], [0, 1]])
    indices, weights = gate(x, given=given)
    free, _ = gate(x)
    forced = given[:, 0] != FREE
    assert torch.equal(indices[forced], given[forced]) and torch.equal(indices[~forced], free[~forced])
    logits = x @ gate.weight.t()
    scores = (logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)).gather(1, indices)
    torch.testing.assert_close(weights, 2.5 * scores / scores.sum(1, keepdim=True))
    weights[:, 0].sum().backward()
    assert gate.weight.grad[7].abs().max() > 0 and x.grad[0].abs().max() > 0


def test_loads_count_the_experts_that_are_used():
    gate = router().train()
    given = torch.tensor([[7, 0], [7, 1], [7, 2]])
    gate(torch.randn(3, 24), given=given)
    assert gate.load.tolist() == [1, 1, 1, 0, 0, 0, 0, 3]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_routing_without_ids_changes_no_bit(depth, recompute):
    model = build(dataclasses.replace(TINY, recursion_depth=depth)).train()
    model.set_recompute(recompute)
    ids, grads = tokens(2, 16), []
    free = torch.full((2, 16, columns(model.config)), FREE)
    for routing in (None, free):
        model.zero_grad()
        model(ids, None, routing).logsumexp(-1).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def recorded(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """What every layer chooses in a plain forward pass: [batch, seq, columns]."""
    chosen: list[torch.Tensor] = []
    gates = [block.mlp.gate for block in model.layers.values() if hasattr(block.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda module, args, out: chosen.append(out[0])) for gate in gates]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.cat(chosen, 1).view(*ids.shape, -1)


@pytest.mark.parametrize("depth", [1, 2])
def test_replaying_a_choice_gives_the_logits_it_gave_whatever_the_bias_has_become(depth):
    model, ids = build(dataclasses.replace(TINY, recursion_depth=depth)), tokens(2, 16)
    routing = recorded(model, ids)
    assert routing.shape[-1] == columns(model.config) == routed_layers(model.config) * 2
    with torch.no_grad():
        before = model(ids)
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.neg_()
        assert (model(ids) - before).abs().max() > 1e-2
        torch.testing.assert_close(model(ids, None, routing), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_uses_the_given_experts_again(recompute):
    model, ids = build(TINY).train(), tokens(2, 16)
    routing = recorded(model, ids).flip(1)
    found = []
    for kind in ("none", recompute):
        model.zero_grad()
        model.set_recompute(kind)
        model(ids, None, routing).logsumexp(-1).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_a_routing_of_another_model_is_refused():
    model, ids = build(TINY), tokens(1, 4)
    with pytest.raises(ValueError, match="a routing of 6 expert ids per token: this model's has 4, 2 for each of 2"):
        model(ids, None, torch.zeros(1, 4, 6, dtype=torch.long))


def test_a_model_without_routed_layers_has_a_routing_of_no_width():
    dense = dataclasses.replace(TINY, first_k_dense_replace=3)
    assert columns(dense) == 0
    model, ids = build(dense), tokens(1, 4)
    with torch.no_grad():
        assert torch.equal(model(ids, None, torch.zeros(1, 4, 0, dtype=torch.long)), model(ids))

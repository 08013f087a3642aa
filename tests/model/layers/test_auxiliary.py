"""Losses of single layers reach their weights with the engine's scale, whatever the main loss is."""

from __future__ import annotations

import pytest
import torch

from model.layers.auxiliary import EVERY_TOKEN, Counting, LayerLosses


def losses() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(2, 3, 4, requires_grad=True)
    return x, torch.tensor([2.0, 3.0], requires_grad=True)


def test_the_loss_gets_the_scale_and_its_weight_and_the_activation_its_own_gradient():
    x, inner = losses()
    out = Counting(losses=LayerLosses(0.25)).add_loss(x * 2, (inner**2).sum(), "aux_loss", weight=3.0)
    (7 * out).sum().backward()
    assert torch.equal(out, x * 2) and torch.equal(x.grad, torch.full_like(x, 14.0))
    torch.testing.assert_close(inner.grad, 0.25 * 3.0 * 2 * inner.detach())


def test_outside_of_a_training_step_and_without_gradients_none_is_wanted():
    counting = Counting(losses=LayerLosses(1.0))
    assert counting.wants_losses and not EVERY_TOKEN.wants_losses
    with torch.no_grad():
        assert not counting.wants_losses
    assert LayerLosses(1.0).pair("aux_loss") == (0.0, 0)


def test_sums_are_unweighted_over_layers_and_tokens_and_a_second_run_is_not_recorded():
    (x, inner), sums = losses(), LayerLosses(1.0)
    for weight in (0.1, 0.2):
        Counting(losses=sums).add_loss(x, inner.sum(), "aux_loss", weight=weight)
    Counting(losses=sums).add_loss(x[0], inner.prod(), "indexer_kl")
    again = Counting(losses=sums, repeated=True).add_loss(x, inner.sum(), "aux_loss")
    again.sum().backward()
    assert sums.pair("aux_loss") == (10.0, 12)
    assert sums.pair("indexer_kl") == (6.0, 3)
    assert torch.equal(inner.grad, torch.ones(2)), "it is trained on nevertheless"


def test_padding_is_not_among_the_tokens():
    (x, inner), sums = losses(), LayerLosses(1.0)
    real = torch.tensor([[True, True, False], [True, False, False]])
    Counting(real, sums).add_loss(x, inner.sum(), "aux_loss")
    assert sums.pair("aux_loss") == (5.0, 3)


def test_a_name_that_is_not_reported_is_refused():
    x, inner = losses()
    with pytest.raises(AssertionError, match="other_loss"):
        Counting(losses=LayerLosses(1.0)).add_loss(x, inner.sum(), "other_loss")

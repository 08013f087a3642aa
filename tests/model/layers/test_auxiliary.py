"""Losses of single layers reach their weights with the engine's scale, whatever the main loss is."""

from __future__ import annotations

import pytest
import torch

from model.layers.auxiliary import add_loss, auxiliary_scale, current_scale, not_recording


def losses() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(2, 3, 4, requires_grad=True)
    return x, torch.tensor([2.0, 3.0], requires_grad=True)


def test_the_loss_gets_the_scale_and_its_weight_and_the_activation_its_own_gradient():
    x, inner = losses()
    with auxiliary_scale(0.25):
        out = add_loss(x * 2, (inner**2).sum(), "aux_loss", weight=3.0)
        (7 * out).sum().backward()
    assert torch.equal(out, x * 2) and torch.equal(x.grad, torch.full_like(x, 14.0))
    torch.testing.assert_close(inner.grad, 0.25 * 3.0 * 2 * inner.detach())


def test_without_a_scale_or_without_gradients_nothing_is_computed():
    x, inner = losses()
    assert current_scale() is None
    assert add_loss(x, inner.sum(), "aux_loss") is x
    with auxiliary_scale(1.0) as sums, torch.no_grad():
        assert current_scale() is None
        assert add_loss(x, inner.sum(), "aux_loss") is x
    assert sums.pair("aux_loss") == (0.0, 0)


def test_sums_are_unweighted_over_layers_and_tokens_and_a_second_run_is_not_recorded():
    x, inner = losses()
    with auxiliary_scale(1.0) as sums:
        add_loss(x, inner.sum(), "aux_loss", weight=0.1)
        add_loss(x, inner.sum(), "aux_loss", weight=0.1)
        add_loss(x[0], inner.prod(), "indexer_kl")
        with not_recording():
            add_loss(x, inner.sum(), "aux_loss")
    assert sums.pair("aux_loss") == (10.0, 12)
    assert sums.pair("indexer_kl") == (6.0, 3)
    assert current_scale() is None


def test_a_name_that_is_not_reported_is_refused():
    x, inner = losses()
    with auxiliary_scale(1.0), pytest.raises(AssertionError, match="other_loss"):
        add_loss(x, inner.sum(), "other_loss")

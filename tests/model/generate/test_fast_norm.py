"""Norms while tokens are generated compute what the model's own do."""

from __future__ import annotations

import pytest
import torch

from model.generate.fast_norm import FastNorm, prepared
from model.layers.norm import DynamicTanh, RMSNorm


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (3, 6), (2, 1, 6), (0, 6)])
@pytest.mark.parametrize("eps", [0.1, 0.0])
@torch.no_grad()
def test_one_token_or_many_are_the_models(shape, eps):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(6, eps)
    norm.weight.copy_(torch.randn(6, generator=generator))
    # Part of a wider row, as latents are; of one token it may be any part.
    x = torch.randn(*shape[:-1], 9, generator=generator)[..., 2:8]
    out = prepared(norm)(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, norm(x), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_what_is_not_rmsnorm_in_fp32_stays_as_it_is():
    for norm in (DynamicTanh(6), RMSNorm(6, 1e-6).bfloat16()):
        assert prepared(norm) is norm
    half = RMSNorm(6, 1e-6).bfloat16()
    x = torch.randn(1, 6).bfloat16()
    torch.testing.assert_close(FastNorm(half)(x), half(x))


@torch.no_grad()
def test_a_token_of_zeros_is_zeros():
    for eps in (1e-6, 1e-12):
        assert (prepared(RMSNorm(4, eps))(torch.zeros(1, 4)) == 0).all()

"""DyT against its formula; what a config makes of `norm`; norms while tokens are generated are the model's own."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.init import init_weights
from model.layers.norm import DynamicTanh, FastNorm, RMSNorm, build_norm, prepared
from model.transformer import Transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dyt_is_weight_times_tanh_of_alpha_x_plus_bias(dtype):
    generator = torch.Generator().manual_seed(0)
    norm = DynamicTanh(6)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 3, 6, generator=generator).to(dtype)
    want = norm.weight * torch.tanh(norm.alpha * x.float()) + norm.bias
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), want.to(dtype))
    torch.testing.assert_close(norm(x[0]), norm(x)[0], rtol=0, atol=0)


def test_a_model_with_dyt_starts_as_the_paper_says_and_counts_its_weights():
    config = ModelConfig(norm="dyt", initializer_range=0.1)
    model = Transformer(config)
    init_weights(model, config, seed=0)
    assert sum(p.numel() for p in model.parameters()) == config.num_params()
    norms = [module for module in model.modules() if isinstance(module, DynamicTanh)]
    assert len(norms) == 2 * (config.num_hidden_layers + 1) + 1 + 3
    for norm in norms:
        assert norm.alpha.tolist() == [0.5] and (norm.weight == 1).all() and (norm.bias == 0).all()
    # MLA's latents keep their own norm.
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == 2 * (config.num_hidden_layers + 1)


def test_the_default_is_rmsnorm_with_the_configs_epsilon():
    norm = build_norm(ModelConfig(rms_norm_eps=0.5))
    assert isinstance(norm, RMSNorm) and norm.eps == 0.5


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (3, 6), (0, 6)])
def test_without_gradients_one_token_or_many_are_torchs_own(shape):
    norm, x = RMSNorm(6, 0.1), torch.randn(*shape)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6))
        torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (6,), norm.weight, 0.1))


def test_rms_norm_trains_as_torchs_own():
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(6, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6, generator=generator))
    x = torch.randn(2, 3, 6, generator=generator, requires_grad=True)
    ours, theirs = norm(x), torch.nn.functional.rms_norm(x, (6,), norm.weight, 1e-6)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(x.shape, generator=generator)
    inputs = (x, norm.weight)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reads", ["both", "past", "sublayer"])
def test_gradients_of_what_goes_past_a_sublayer_and_of_what_it_reads_add_up(dtype, reads):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(6, 1e-6)
    start = torch.randn(2, 3, 6, generator=generator).to(dtype)
    weights = [torch.randn(2, 3, 6, generator=generator) * (reads in ("both", name)) for name in ("past", "sublayer")]
    x = start.clone().requires_grad_()
    past, read = norm.beside(x)
    assert torch.equal(past, x) and torch.equal(read, norm(x))
    used = [weight * out for weight, out in zip(weights, (past, read), strict=True) if weight.any()]
    torch.stack(used).sum().backward()
    plain = start.clone().requires_grad_()
    normed = torch.nn.functional.rms_norm(plain.float(), (6,), norm.weight, 1e-6)
    (weights[0] * plain + weights[1] * normed).sum().backward()
    assert (x.grad - plain.grad).norm() < (1e-6 if dtype == torch.float32 else 0.005) * plain.grad.norm()


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

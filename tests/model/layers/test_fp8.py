"""Products in 8 bits against the same rounding done by the plain definition in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.build import use_fp8
from model.config import ModelConfig
from model.kernels.cuda.fp8_kernel import kernel_for, kernel_product
from model.kernels.weight_gradients import BackwardSplit
from model.layers.fp8 import (
    LARGEST,
    TILE,
    Quantised,
    fp8_grouped_linear,
    fp8_linear,
    quantise_blocks,
    quantise_tiles,
)
from model.layers.linear import Linear
from model.moe.experts import RoutedExperts
from model.transformer import Transformer


def e4m3(value: float) -> float:
    """Nearest number with 4 exponent and 3 mantissa bits, ties to even; at most 448."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(abs(value))[1] - 1, -6) - 3)
    return math.copysign(min(round(abs(value) / step) * step, LARGEST), value)


def rounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Every tile of rows x columns divided by the smallest power of two that fits it, rounded, and multiplied again."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = x[i : i + rows, j : j + columns].double()
            largest = float(tile.abs().max())
            scale = 2.0 ** math.ceil(math.log2(largest / LARGEST)) if largest else 1.0
            values = [[e4m3(float(v) / scale) * scale for v in row] for row in tile]
            out[i : i + rows, j : j + columns] = torch.tensor(values, dtype=torch.float64)
    return out


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of very different sizes, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(4).exp2()


def test_tiles_and_blocks_are_rounded_as_defined():
    x = random(5, 300)
    assert torch.equal(quantise_tiles(x).dequantise().double(), rounded(x, 1, TILE))
    w = random(140, 150, seed=1)
    assert torch.equal(quantise_blocks(w).dequantise().double(), rounded(w, TILE, TILE))
    assert quantise_tiles(x).scale.shape == (5, 3) and quantise_blocks(w).scale.shape == (2, 2)


@given(st.integers(1, 4), st.integers(1, 300), st.integers(-60, 60), st.integers(0, 100))
def test_round_trip_is_within_a_sixteenth_or_the_smallest_step(rows, columns, exponent, seed):
    x = random(rows, columns, seed=seed) * 2.0**exponent
    quantised = quantise_tiles(x)
    scale = quantised.scale.repeat_interleave(TILE, -1)[:, :columns]
    assert torch.equal(scale.log2(), scale.log2().round()), "scales are powers of two"
    # Half a step: 2^-4 of the number, or 2^-10 where numbers have no leading bit.
    bound = torch.maximum(x.abs() * 2**-4, scale * 2**-10)
    assert ((quantised.dequantise() - x).abs() <= bound).all()
    again = quantise_tiles(quantised.dequantise())
    assert torch.equal(again.dequantise(), quantised.dequantise()), "what is 8 bits already stays"


def test_zeros_are_zeros():
    assert torch.equal(quantise_blocks(torch.zeros(3, 200)).dequantise(), torch.zeros(3, 200))


def reference(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fprop, Dgrad and Wgrad in fp64 over the same rounded numbers."""
    kept, matrix = rounded(x, 1, TILE), rounded(weight, TILE, TILE)
    dx = rounded(grad, 1, TILE) @ matrix
    dw = rounded(grad.t(), 1, TILE) @ rounded(kept.float().t(), 1, TILE).t()
    return kept @ matrix.t(), dx, dw


def test_all_three_products_are_those_of_the_rounded_numbers():
    x, weight, grad = random(150, 140), random(136, 140, seed=1), random(150, 136, seed=2)
    leaf, parameter = x.clone().requires_grad_(), torch.nn.Parameter(weight)
    out = fp8_linear(leaf.view(3, 50, 140), parameter)
    assert out.shape == (3, 50, 136) and out.dtype == torch.float32
    out.backward(grad.view(3, 50, 136))
    found = out.view(150, 136), leaf.grad, parameter.grad
    for value, expected in zip(found, reference(x, weight, grad), strict=True):
        scale = expected.abs().max()
        assert (value.double() - expected).abs().max() <= 1e-5 * scale


def test_each_expert_multiplies_its_own_rows():
    counts = torch.tensor([3, 0, 140, 7])
    x, weight, grad = random(150, 20), random(4, 24, 20, seed=1), random(150, 24, seed=2)
    leaf, parameter = x.clone().requires_grad_(), torch.nn.Parameter(weight)
    out = fp8_grouped_linear(leaf, parameter, counts)
    out.backward(grad)
    start = 0
    for e, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        start += count
        if not count:
            assert torch.equal(parameter.grad[e], torch.zeros(24, 20))
            continue
        alone, own = x[rows].clone().requires_grad_(), torch.nn.Parameter(weight[e])
        expected = fp8_linear(alone, own)
        expected.backward(grad[rows])
        assert torch.equal(out[rows], expected)
        assert torch.equal(leaf.grad[rows], alone.grad) and torch.equal(parameter.grad[e], own.grad)


@pytest.mark.parametrize("experts", [False, True])
def test_weight_gradients_can_wait(experts):
    x, weight = random(9, 20), random(2, 16, 20, seed=1)

    split = BackwardSplit()

    def run(parameter: torch.nn.Parameter) -> Tensor:
        if experts:
            return fp8_grouped_linear(x, parameter, torch.tensor([4, 5]), split)
        return fp8_linear(x, parameter, split)

    whole, parts = (torch.nn.Parameter((weight if experts else weight[0]).clone()) for _ in range(2))
    run(whole).square().sum().backward()
    out = run(parts)
    with split.deferred() as queue:
        out.square().sum().backward()
    assert parts.grad is None and len(queue) == 1
    queue.run()
    assert torch.equal(parts.grad, whole.grad)


def test_under_autocast_the_output_is_bf16_and_gradients_are_the_parameters():
    parameter = torch.nn.Parameter(random(16, 20))
    x = random(9, 20, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = fp8_linear(x, parameter)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, fp8_linear(x.detach(), parameter.detach()))
        out.float().sum().backward()
    assert (x.grad.dtype, parameter.grad.dtype) == (torch.float32, torch.float32)


def test_blocks_compute_in_8_bits_and_what_surrounds_them_does_not():
    config = ModelConfig(attention="dsa", num_hidden_layers=2)
    model = Transformer(config)
    use_fp8(model)
    own = {name for name, module in model.named_modules() if "product" in vars(module)}
    linear = {name for name, m in model.named_modules() if isinstance(m, Linear | RoutedExperts)}
    assert linear - own == {name for name in linear if "indexer" in name} | {"mtp.0.eh_proj", "lm_head"}
    assert any("experts" in name for name in own) and any("kv_b_proj" in name for name in own)


def test_the_kernel_is_not_used_on_a_cpu():
    assert not kernel_for(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(48, 256, 384), (5, 200, 300), (1, 1, 1), (257, 129, 640)])
def test_the_kernel_gives_what_the_plain_product_gives(m, n, k):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("block scales need a GPU of compute capability 9.0")
    assert kernel_for(torch.device("cuda", 0))
    a = quantise_tiles(random(m, k).cuda())
    for b in (quantise_blocks(random(n, k, seed=1).cuda()), quantise_tiles(random(n, k, seed=1).cuda())):
        found = kernel_product(a.values, a.scale, b.values, b.scale, torch.float32)
        meant = a.dequantise() @ b.dequantise().t()
        assert (found - meant).abs().max() <= 1e-2 * meant.abs().max()


def test_values_keep_their_place_when_transposed():
    w = random(140, 260)
    q = quantise_blocks(w)
    turned = Quantised(q.values.t(), q.scale.t())
    assert torch.equal(turned.dequantise(), q.dequantise().t())

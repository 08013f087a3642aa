"""SwiGLU with its own backward equals autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.kernels.swiglu import gated, scaled_swiglu


def test_swiglu_equals_the_formula_forward_and_backward():
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(7, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(7, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, -1)
    plain, ours = F.silu(gate) * up * scale, scaled_swiglu(gate_up, scale)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    before = grad.clone()
    expected = torch.autograd.grad(plain, [gate_up, scale], grad)
    for a, b in zip(torch.autograd.grad(ours, [gate_up, scale], grad), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_apart_too_to_the_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(7, 6, generator=generator).to(dtype) for _ in range(3))
    wanted = [gate.requires_grad_(), up.requires_grad_()]
    ours, plain = gated(gate, up), F.silu(gate) * up
    assert torch.equal(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(plain, wanted, grad), strict=True):
        assert torch.equal(a, b)

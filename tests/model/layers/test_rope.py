"""Rotary positions turn pairs of features wherever they lie in memory."""

from __future__ import annotations

import pytest
import torch

from model.layers.rope import apply_rotary


@pytest.mark.parametrize("width", [4, 8, 9])  # of rows whose last four features turn
@pytest.mark.parametrize("seq", [1, 3])
def test_pairs_turn_by_their_angles_with_gradients(width, seq):
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(1, seq, 2, generator=generator)
    rotation = torch.polar(torch.ones_like(angles), angles)
    rows = torch.randn(2, seq, 2, width, generator=generator, requires_grad=True)
    turned = apply_rotary(rows[..., -4:], rotation)

    even, odd = rows[..., -4::2], rows[..., -3::2]
    cos, sin = (f(angles).unsqueeze(2) for f in (torch.cos, torch.sin))
    expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    torch.testing.assert_close(turned, expected)
    upstream = torch.randn(turned.shape, generator=generator)
    got, wanted = (torch.autograd.grad(out, rows, upstream)[0] for out in (turned, expected))
    torch.testing.assert_close(got, wanted)

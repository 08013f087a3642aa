"""Attention by blocks equals the formula, values and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.core import document_mask
from model.attention.kinds import meets_documents_alone
from model.kernels.cpu import blocks
from model.kernels.cpu.blocked import BlockedAttention, blocked_attention
from model.kernels.cpu.blocks import Part, document_parts, visible_parts
from model.kernels.cpu.fused_blocks import FusedBlocks
from scripts.model_bench.competitors import SHAPES

DIVISIONS = {
    "blocks of what is visible": lambda mask, seq: visible_parts(mask, 2, None),
    "blocks from the first document": lambda mask, seq: document_parts(mask, 2, seq, alone=False),
    "documents alone": lambda mask, seq: blocks._apart(blocks.document_starts(mask), 2),
    "no mask": lambda mask, seq: document_parts(None, 2, seq, alone=True),
}


def plain(q, k, v, mask, scale):
    scores = q @ k.transpose(-1, -2) * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("form", [BlockedAttention, FusedBlocks])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 3), st.sampled_from([(8, 8), (12, 4), (4, 6)]),
       st.sampled_from(list(DIVISIONS)), st.sampled_from([0.01, 0.5]), st.integers(0, 99))  # fmt: skip
def test_parts_equal_the_formula_for_any_length_and_widths(form, seq, heads, widths, division, often, seed):
    form = BlockedAttention if widths[1] > widths[0] else form  # the other one pads values to the keys' width
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, heads, seq, widths[0], generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, heads, seq, widths[1], generator=generator, dtype=torch.float64)
    begins = torch.rand(2, seq, generator=generator) < (0 if division == "no mask" else often)
    mask = document_mask(begins.cumsum(1))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    # A block's softmax is in fp32.
    ours = form.apply(q, k, v, None if division == "no mask" else mask, 0.3, DIVISIONS[division](mask, seq))
    expected = plain(q, k, v, mask, 0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_values_wider_than_keys_are_no_matter():
    q, k, v = (torch.randn(1, 2, 70, width, generator=torch.Generator().manual_seed(0)) for width in (4, 4, 6))
    expected = plain(q, k, v, document_mask(torch.zeros(1, 70).long()), 0.5)
    torch.testing.assert_close(blocked_attention(q, k, v, None, 0.5, None, False), expected, rtol=1e-5, atol=1e-6)


def test_a_block_meets_no_key_before_the_first_document_that_it_sees():
    doc_ids = torch.stack([torch.arange(256) // 100, torch.arange(256) // 70])  # the second begins at 70, 140, 210
    mask = document_mask(doc_ids)
    for met in (document_parts(mask, 2, 256, alone=False), visible_parts(mask, 2, None)):
        assert [(part.queries.start, part.keys) for part in met] == [
            (0, slice(0, 64)), (64, slice(0, 128)), (128, slice(70, 192)), (192, slice(100, 256))
        ]  # fmt: skip


def test_documents_are_met_alone_where_that_computes_less():
    first = 16 * torch.arange(8)[:, None]  # where each row's second document begins; the third comes 200 after it
    doc_ids = (torch.arange(512) >= first).long() + (torch.arange(512) >= first + 200)
    met = document_parts(document_mask(doc_ids), 8, 512, alone=True)
    expected = []
    for i in range(8):
        row, second, third = slice(i, i + 1), 16 * i, 16 * i + 200
        expected += [Part(row, slice(0, second), slice(0, second), True)] if second else []
        for start, stop in ((second, third), (third, 512)):
            for piece in range(start, stop, 128):
                end = min(piece + 128, stop)
                expected.append(Part(row, slice(piece, end), slice(start, end), True))
    assert met == expected
    short = document_mask((torch.arange(64) // 8).expand(2, -1))
    assert document_parts(short, 2, 64, alone=True) == [Part(slice(0, 2), slice(0, 64), slice(0, 64), False)]


def test_rows_of_one_document_need_no_mask():
    mask = document_mask(torch.zeros(3, 70).long())
    assert document_parts(mask, 3, 70, alone=True) == document_parts(None, 3, 70, alone=True)


@pytest.mark.parametrize("seq", [64, 65, 200])
def test_in_bf16_it_is_as_close_to_the_exact_result_as_torchs_kernel(seq):
    generator = torch.Generator().manual_seed(seq)
    q, k, v = (torch.randn(1, 2, seq, 16, generator=generator) for _ in range(3))
    exact = plain(q, k, v, document_mask(torch.zeros(1, seq).long()), 0.25)
    half = [t.bfloat16() for t in (q, k, v)]
    ours = BlockedAttention.apply(*half, None, 0.25, document_parts(None, 1, seq, alone=False)).float()
    torchs = torch.nn.functional.scaled_dot_product_attention(*half, is_causal=True, scale=0.25).float()
    assert (ours - exact).norm() < 1.5 * (torchs - exact).norm()


@pytest.mark.parametrize(
    ("changes", "device", "dtype", "alone"),
    [
        ({}, "cpu", torch.float32, True),
        ({}, "cpu", torch.bfloat16, False),
        ({}, "cuda", torch.float32, False),
        ({"qk_nope_head_dim": 64}, "cpu", torch.float32, False),  # a wide head
        ({"v_head_dim": 32}, "cpu", torch.float32, False),  # values wider than keys
        ({"attention": "sliding"}, "cpu", torch.float32, False),
        ({"position": "cope"}, "cpu", torch.float32, False),
    ],
)
def test_it_is_known_beforehand_where_documents_are_met_alone(changes, device, dtype, alone):
    config = replace(SHAPES["tiny"], **changes)
    assert meets_documents_alone(config, 512, torch.device(device), dtype) is alone

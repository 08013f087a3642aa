"""Contextual positions against the code printed in their paper, and what follows from their definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention.cope import contextual_attention, position_logits
from model.attention.core import document_mask, softmax_attention
from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer
from tests.attention_kinds import KINDS, SMALL, built, inputs


def printed_in_the_paper(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, table: Tensor) -> Tensor:
    """arXiv:2405.18719, appendix: SelfAttn.forward with CoPE.forward written out; one head, [batch, seq, dim]."""
    attn_logits = torch.bmm(query, key.transpose(-1, -2)) / query.shape[-1] ** 0.5
    attn_logits = attn_logits + mask.float().log()
    gates = torch.sigmoid(attn_logits)
    pos = gates.flip(-1).cumsum(dim=-1).flip(-1)
    pos = pos.clamp(max=table.shape[0] - 1)
    pos_ceil, pos_floor = pos.ceil().long(), pos.floor().long()
    logits_int = torch.matmul(query, table.t())
    logits_ceil, logits_floor = logits_int.gather(-1, pos_ceil), logits_int.gather(-1, pos_floor)
    w = pos - pos_floor
    return torch.bmm(torch.softmax(attn_logits + logits_ceil * w + logits_floor * (1 - w), -1), value)


@settings(max_examples=20, deadline=None)
@given(seq=st.integers(1, 17), positions=st.integers(1, 20), groups=st.sampled_from([1, 2, 4]), cut=st.integers(0, 16))
def test_contextual_attention_and_its_gradients_are_the_papers(seq, positions, groups, cut):
    generator = torch.Generator().manual_seed(seq)
    q, k, v = (
        torch.randn(2, heads, seq, 6, generator=generator, requires_grad=True)
        for heads in (4, 4 // groups, 4 // groups)
    )
    table = torch.randn(positions, 6, generator=generator, requires_grad=True)
    mask = document_mask((torch.arange(seq) >= cut).long().expand(2, -1))
    got = contextual_attention(q, k, v, table, scale=6**-0.5, mask=mask)
    expected = torch.stack(
        [printed_in_the_paper(q[:, h], k[:, h // groups], v[:, h // groups], mask[:, 0], table) for h in range(4)], 1
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(got.shape, generator=generator)
    wrt = (q, k, v, table)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), wrt) for out in (got, expected))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_open_gates_count_tokens_and_closed_gates_count_none():
    per_position = torch.tensor([[0.0, 10.0, 20.0, 30.0]])  # so the logit is ten times the position
    assert position_logits(torch.full((1, 6), 40.0), per_position).tolist() == [[30.0, 30.0, 30.0, 30.0, 20.0, 10.0]]
    assert position_logits(torch.full((1, 6), -torch.inf), per_position).tolist() == [[0.0] * 6]
    half = position_logits(torch.zeros(1, 6), per_position)
    assert half.tolist() == [[30.0, 25.0, 20.0, 15.0, 10.0, 5.0]]


def test_a_table_of_zeros_is_attention_without_positions():
    q, k, v = torch.randn(3, 2, 4, 9, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    got = contextual_attention(q, k, v, torch.zeros(5, 6), scale=0.4, mask=None)
    torch.testing.assert_close(got, softmax_attention(q, k, v, scale=0.4, mask=None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "cope" in kind])
def test_contextual_positions_take_the_place_of_rotary_ones(kind):
    config = KINDS[kind]
    attention = built(config)
    x, rotation, mask = inputs(config, torch.zeros(1, 12, dtype=torch.long))
    torch.testing.assert_close(attention(x, rotation.roll(3, 1), mask), attention(x, rotation, mask))


def test_the_order_of_tokens_matters_with_a_table_and_not_without():
    config = KINDS["mha, cope"]
    attention = built(config)
    x, rotation, mask = inputs(config, torch.zeros(1, 12, dtype=torch.long))
    swapped = x[:, [*range(9), 10, 9, 11]]
    last = [attention(rows, rotation, mask)[0, -1] for rows in (x, swapped)]
    assert (last[0] - last[1]).abs().max() > 1e-3
    torch.nn.init.zeros_(attention.position_embedding)
    last = [attention(rows, rotation, mask)[0, -1] for rows in (x, swapped)]
    torch.testing.assert_close(last[0], last[1], rtol=1e-5, atol=1e-5)


def test_positions_start_at_none_and_are_learned():
    config = replace(KINDS["gqa, cope"], num_nextn_predict_layers=0)
    model = Transformer(config)
    init_weights(model, config, seed=0)
    table = model.layers["0"].self_attn.position_embedding
    assert table.shape == (config.cope_positions, config.head_dim) and not bool(table.any())
    model(torch.randint(0, 48, (2, 16))).logsumexp(-1).sum().backward()
    assert table.grad is not None and bool(table.grad.any())


@pytest.mark.parametrize("attention", ["dsa", "sliding"])
def test_attention_that_does_not_read_every_token_is_refused(attention):
    with pytest.raises(ValueError, match=f"position=cope with attention={attention}: a contextual position counts"):
        ModelConfig(attention=attention, position="cope").validate()
    SMALL.validate()

"""Attention with keys and values per head or group: the plain formula, and the kinds against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention.grouped import GroupedAttention
from model.config import ModelConfig, RopeScaling
from tests.attention_kinds import GQA, KINDS, SMALL, built, inputs


def projections(attention: GroupedAttention) -> dict[str, Tensor]:
    """Weights of queries, keys and values by the names that all kinds but MQA have."""
    if attention.config.attention != "mqa":
        return {f"{n}_proj.weight": attention.get_parameter(f"{n}_proj.weight") for n in ("q", "k", "v")}
    key, value = attention.kv_proj_with_mqa.weight.chunk(2)
    return {"q_proj.weight": attention.q_proj.weight, "k_proj.weight": key, "v_proj.weight": value}


def plain_formula(attention: GroupedAttention, x: Tensor, places: list[int], document: list[int]) -> Tensor:
    """One row, head by head and query by query: x [seq, hidden] -> [seq, hidden]."""
    config = attention.config
    heads, dim = config.num_attention_heads, config.head_dim
    q, k, v = ((x @ weight.t()).unflatten(-1, (-1, dim)) for weight in projections(attention).values())
    frequency = config.rope_theta ** (-torch.arange(0, dim, 2).float() / dim)
    angle = torch.tensor(places)[:, None] * frequency  # [seq, dim / 2]

    def turned(part: Tensor) -> Tensor:
        even, odd = part[..., 0::2], part[..., 1::2]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    q, k = turned(q), turned(k)
    out = torch.zeros(len(x), heads, dim)
    for head in range(heads):
        group = head // (heads // config.num_kv_heads)
        for i in range(len(x)):
            seen = [j for j in range(i + 1) if document[j] == document[i]]
            scores = torch.stack([q[i, head] @ k[j, group] for j in seen]) / dim**0.5
            out[i, head] = scores.softmax(0) @ v[seen, group]
    return out.flatten(1) @ attention.o_proj.weight.t()


@settings(max_examples=20, deadline=None)
@given(
    groups=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3), (6, None)]),
    dim=st.sampled_from([2, 6, 8]),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_grouped_attention_is_the_plain_formula(groups, dim, lengths):
    heads, kv = groups
    kind = "gqa" if kv else "mqa"
    config = replace(SMALL, attention=kind, num_attention_heads=heads, num_key_value_heads=kv, head_dim=dim)
    attention = built(config)
    document = [i for i, length in enumerate(lengths) for _ in range(length)]
    places = [place for length in lengths for place in range(length)]
    x, rotation, mask = inputs(config, torch.tensor([document]))
    with torch.no_grad():
        expected = plain_formula(attention, x[0], places, document)
        torch.testing.assert_close(attention(x, rotation, mask)[0], expected, rtol=1e-5, atol=1e-5)


def test_no_mask_is_plain_causal_attention():
    for config in (KINDS["mha"], GQA, KINDS["mqa"], KINDS["gqa, cope"]):
        attention = built(config)
        x, rotation, mask = inputs(config, torch.zeros(2, 9, dtype=torch.long))
        torch.testing.assert_close(attention(x, rotation, None), attention(x, rotation, mask), rtol=1e-5, atol=1e-5)


def tied(config: ModelConfig, source: GroupedAttention) -> GroupedAttention:
    """`source` with its key and value heads repeated for the heads of `config`."""
    attention = built(config)
    copies = config.num_kv_heads // source.config.num_kv_heads
    state = {n: p for n, p in source.state_dict().items() if n in attention.state_dict()} | projections(source)
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = state[name].unflatten(0, (-1, config.head_dim))
        state[name] = heads.repeat_interleave(copies, 0).flatten(0, 1)
    attention.load_state_dict(state)
    return attention


@pytest.mark.parametrize("position", ["rope", "cope"])
def test_mqa_is_gqa_with_one_group_and_mha_with_tied_heads(position):
    mqa = built(replace(KINDS["mqa"], position=position))
    one_group = replace(GQA, num_key_value_heads=1, position=position)
    x, rotation, mask = inputs(SMALL, torch.zeros(2, 11, dtype=torch.long))
    rotation = inputs(GQA, torch.zeros(2, 11, dtype=torch.long))[1]
    expected = mqa(x, rotation, mask)
    for config in (one_group, replace(GQA, position=position), replace(KINDS["mha"], position=position)):
        torch.testing.assert_close(tied(config, mqa)(x, rotation, mask), expected, rtol=1e-5, atol=1e-5)


def test_mha_is_gqa_with_as_many_groups_as_heads():
    mha = built(KINDS["mha"])
    gqa = tied(replace(GQA, num_key_value_heads=None), mha)
    x, rotation, mask = inputs(GQA, torch.tensor([[0] * 5 + [1] * 6]))
    assert torch.equal(gqa(x, rotation, mask), mha(x, rotation, mask))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(place=st.integers(0, 23), packed=st.booleans())
def test_changing_a_token_changes_nothing_before_it_or_in_other_documents(kind, place, packed):
    config = KINDS[kind]
    attention = built(config)
    doc_ids = (torch.arange(24)[None] >= 10).long() if packed else torch.zeros(1, 24, dtype=torch.long)
    x, rotation, mask = inputs(config, doc_ids)
    changed = x.clone()
    changed[0, place] += 1.0
    with torch.no_grad():
        before, after = attention(x, rotation, mask), attention(changed, rotation, mask)
    touched = (after - before).abs().amax(-1)[0] > 1e-6
    own = doc_ids[0] == doc_ids[0, place]
    assert bool(touched[place]) and not bool(touched[:place].any()) and not bool(touched[~own].any())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_documents_alone(kind):
    config = KINDS[kind]
    attention = built(config)
    lengths = [7, 1, 12]
    doc_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    x, rotation, mask = inputs(config, doc_ids)
    with torch.no_grad():
        packed = attention(x, rotation, mask)
        for alone, got in zip(x.split(lengths, 1), packed.split(lengths, 1), strict=True):
            single = torch.zeros(1, alone.shape[1], dtype=torch.long)
            _, rotation, mask = inputs(config, single)
            torch.testing.assert_close(got, attention(alone, rotation, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_analytic_parameter_counts_equal_the_built_attention(kind):
    attention = built(KINDS[kind])
    assert sum(p.numel() for p in attention.parameters()) == KINDS[kind].attention_params()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "gqa", "num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads=8"),
        ({"attention": "gqa", "num_key_value_heads": 0}, "num_key_value_heads=0: must be at least 1"),
        ({"attention": "mqa", "num_key_value_heads": 2}, "num_key_value_heads=2 with attention=mqa: it has 1; leave"),
        ({"attention": "mha", "num_key_value_heads": 2}, "attention=mha: it has 8; leave the key away, or use"),
        ({"attention": "mha", "head_dim": 7}, "head_dim=7: rotary features come in pairs"),
        ({"attention": "sliding", "sliding_window": 0}, "sliding_window=0: must be at least 1"),
        ({"attention": "sliding", "global_stride": 0}, "global_stride=0: must be at least 1"),
        ({"position": "cope", "rope_scaling": RopeScaling(2.0, 32)}, "rope_scaling with position=cope: there are no"),
        ({"position": "cope", "cope_positions": 0}, "cope_positions=0: must be at least 1"),
        ({"attention": "linear"}, "attention=linear: must be one of mla, dsa, mha, gqa, mqa, sliding"),
    ],
)
def test_attention_that_cannot_be_built_is_refused_by_name_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes).validate()

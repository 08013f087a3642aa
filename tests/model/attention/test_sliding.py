"""The tokens a sliding window shows, against their definition; and the ends of its range."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.core import document_mask, softmax_attention
from model.attention.kinds import visible_tokens
from model.attention.sliding import sliding_mask
from model.kernels.cpu import blocked
from model.kernels.cpu.blocks import visible_parts
from tests.attention_kinds import KINDS, built, inputs


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    window=st.integers(1, 15),
    stride=st.integers(1, 15),
)
def test_a_query_sees_the_window_and_every_so_many_th_token_of_its_document(lengths, window, stride):
    places = [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    mask = sliding_mask(torch.tensor([[document for document, _ in places]]), window, stride)[0, 0]
    for i, (document, place) in enumerate(places):
        for j, (other, earlier) in enumerate(places):
            visible = other == document and earlier <= place and (place - earlier < window or earlier % stride == 0)
            assert bool(mask[i, j]) == visible


def test_a_window_over_the_whole_row_or_a_stride_of_one_is_full_attention():
    doc_ids = torch.tensor([[0] * 5 + [1] * 11])
    assert torch.equal(sliding_mask(doc_ids, 11, 99), document_mask(doc_ids))
    assert torch.equal(sliding_mask(doc_ids, 1, 1), document_mask(doc_ids))


def test_sliding_over_the_whole_row_equals_grouped_attention():
    sliding, gqa = replace(KINDS["sliding, grouped"], sliding_window=30), KINDS["gqa"]
    x, rotation, mask = inputs(sliding, torch.zeros(2, 20, dtype=torch.long))
    torch.testing.assert_close(built(sliding)(x, rotation, mask), built(gqa)(x, rotation, None), rtol=1e-5, atol=1e-5)


def test_rows_without_documents_slide_as_one_document_each():
    config = KINDS["sliding"]
    mask = visible_tokens(config, None, 20, torch.device("cpu"))
    expected = sliding_mask(torch.zeros(1, 20, dtype=torch.long), config.sliding_window, config.global_stride)
    assert mask is not None and torch.equal(mask, expected) and not bool(mask[0, 0, 19, 13])


@given(seq=st.integers(1, 60), window=st.integers(1, 70), stride=st.integers(1, 20))
def test_attended_tokens_are_the_masks_mean(seq, window, stride):
    config = replace(KINDS["sliding"], sliding_window=window, global_stride=stride)
    mask = sliding_mask(torch.zeros(1, seq, dtype=torch.long), window, stride)
    exact = int(mask.sum()) // seq if window < seq else seq // 2  # of causal attention the diagonal is not counted
    assert config.attended_tokens(seq) == exact


def test_a_window_saves_operations_of_long_rows_alone():
    full, sliding = KINDS["mha"], KINDS["sliding"]
    assert sliding.flops_per_token(4) == full.flops_per_token(4)
    layers, heads = full.num_hidden_layers + full.num_nextn_predict_layers, full.num_attention_heads
    saved = full.flops_per_token(64) - sliding.flops_per_token(64)
    assert saved == 6 * layers * heads * 2 * full.head_dim * (32 - sliding.attended_tokens(64))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    window=st.integers(1, 100),
    stride=st.integers(1, 60),
    kv=st.sampled_from([1, 2]),
)
def test_blocks_that_leave_out_hidden_keys_change_nothing_but_the_work(lengths, window, stride, kv):
    """Rows differ in their documents, so that their blocks see different columns."""
    generator = torch.Generator().manual_seed(len(lengths))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    doc_ids = torch.stack([documents, torch.zeros_like(documents)])
    mask = sliding_mask(doc_ids, window, stride)
    q, k, v = (torch.randn(2, n, len(documents), 4, generator=generator, requires_grad=True) for n in (2, kv, kv))
    weight = torch.randn(2, 2, len(documents), 4, generator=generator)
    outs = [softmax_attention(q, k, v, scale=0.5, mask=mask, window=reach) for reach in (window, None)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
    ours, whole = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in outs)
    for own, other in zip(ours, whole, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_a_block_meets_its_window_and_the_strided_tokens_before_it():
    mask = sliding_mask(torch.zeros(1, 256, dtype=torch.long), 20, 50)
    met = [part.keys for part in visible_parts(mask, 1, 20)]
    assert isinstance(met[3], torch.Tensor) and met[3].tolist() == [0, 50, 100, 150, *range(173, 256)]
    assert met[1] == slice(0, 128)  # too few before the window to choose among
    assert visible_parts(mask, 1, None)[3].keys == slice(0, 256)


def test_rows_too_long_to_keep_probabilities_keep_them_where_a_window_makes_them_few(monkeypatch):
    mask = sliding_mask(torch.zeros(1, 300, dtype=torch.long), 16, 7)
    q, k, v = torch.randn(3, 2, 2, 300, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    monkeypatch.setattr(blocked, "LONGEST", 32)
    calls = []
    apply = blocked.BlockedAttention.apply

    def counted(*args):
        calls.append(args)
        return apply(*args)

    monkeypatch.setattr(blocked.BlockedAttention, "apply", counted)
    with_window = softmax_attention(q, k, v, scale=0.5, mask=mask, window=16)
    without = softmax_attention(q, k, v, scale=0.5, mask=mask)
    assert len(calls) == 1
    torch.testing.assert_close(with_window, without, rtol=1e-5, atol=1e-6)

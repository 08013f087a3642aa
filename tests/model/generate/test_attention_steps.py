"""Every kind of attention, one token at a time over its cache, gives what the module gives for the whole row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.kinds import build_attention
from model.config import ModelConfig
from model.generate.attention_steps import build_decode_attention
from model.generate.cache import KVCache
from model.generate.decoder import Decoder
from model.layers.rope import rotary_table
from model.transformer import Transformer
from tests.attention_kinds import KINDS, SMALL, built, inputs, randomise

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [4, 4, 4, 4]]
VARIANTS = KINDS | {
    "a window of one": replace(KINDS["sliding"], sliding_window=1, global_stride=3),
    "a stride beyond the row": replace(KINDS["sliding"], sliding_window=3, global_stride=60),
    "every token in the stride": replace(KINDS["sliding, grouped"], sliding_window=2, global_stride=1),
    "one position": replace(KINDS["gqa, cope"], cope_positions=1),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_steps_equal_the_module_on_the_whole_row(kind):
    config = VARIANTS[kind]
    attention = built(config)
    step = build_decode_attention(attention)
    x, rotation, mask = inputs(config, torch.zeros(2, 20, dtype=torch.long))
    residual = torch.randn(2, 20, config.hidden_size)
    with torch.inference_mode():
        expected = attention(x, rotation, mask) + residual
        [cache] = KVCache.allocate([step.width], torch.zeros(2, dtype=torch.long), 23, x.dtype).layers
        step.remember(x[:, :7], rotation[:, :7], cache[:, :7])
        for column in range(7, 20):
            bias = torch.zeros(2, 1, column + 1)
            turned = rotation[:, column : column + 1]
            got = step.step(x[:, column], residual[:, column], turned, cache, bias, column)
            torch.testing.assert_close(got, expected[:, column], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VARIANTS)
def test_rows_of_unequal_lengths_decode_as_they_would_alone(kind):
    """Prefill pads the shorter rows; selecting rows drops columns: neither may move a window or a stride."""
    config = VARIANTS[kind]
    model = Transformer(config).eval()
    randomise(model)
    decoder = Decoder(model)
    rows = [list(prompt) for prompt in PROMPTS]
    logits, cache = decoder.prefill(rows, capacity=16)
    generator = torch.Generator().manual_seed(0)
    for count in range(14):
        for row, got in zip(rows, logits, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([row]))[0, -1]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
        if count == 6:
            kept = torch.tensor([3, 0, 0])
            rows, cache = [list(rows[i]) for i in kept], cache.select(kept, 16)
        tokens = torch.randint(0, config.vocab_size, (len(rows),), generator=generator)
        logits = decoder.step(tokens, cache)
        rows = [row + [int(token)] for row, token in zip(rows, tokens, strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 24),
    stride=st.integers(1, 24),
    kv=st.sampled_from([1, 2, 4]),
    padding=st.lists(st.integers(0, 12), min_size=1, max_size=3),
)
def test_a_sliding_step_reads_what_the_mask_shows(window, stride, kv, padding):
    config = replace(
        SMALL, attention="sliding", num_attention_heads=4, num_key_value_heads=kv, sliding_window=window,
        global_stride=stride,
    )  # fmt: skip
    attention = built(config)
    step = build_decode_attention(attention)
    rows, n = len(padding), 20
    begins = torch.tensor(padding)
    x, rotation, mask = inputs(config, (torch.arange(n) >= begins[:, None]).long())
    bias = torch.zeros(rows, 1, n).masked_fill(torch.arange(n) < begins[:, None, None], -torch.inf)
    with torch.inference_mode():
        expected = attention(x, rotation, mask)[:, -1]
        cache = torch.empty(rows, n, step.width)
        step.remember(x[:, :-1], rotation[:, :-1], cache[:, :-1])
        got = step.step(x[:, -1], torch.zeros_like(expected), rotation[:, -1:], cache, bias, n - 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "width"),
    [("mla", 16 + 4), ("mha", 2 * 8 * 8), ("gqa", 2 * 2 * 8), ("mqa", 2 * 8), ("sliding, grouped", 2 * 2 * 8)],
)
def test_a_token_takes_its_keys_and_values_in_the_cache_and_no_more(kind, width):
    assert build_decode_attention(build_attention(KINDS[kind])).width == width


@pytest.mark.parametrize("kind", VARIANTS)
def test_weights_in_bfloat16_decode_close_to_fp32(kind):
    config: ModelConfig = VARIANTS[kind]
    attention = built(config)
    x, _, mask = inputs(config, torch.zeros(3, 9, dtype=torch.long))
    rotation = rotary_table(config)[None, :9]
    with torch.inference_mode():
        expected = attention(x, rotation, mask)[:, -1]
        half, x = attention.bfloat16(), x.bfloat16()
        step = build_decode_attention(half)
        cache = torch.empty(3, 9, step.width, dtype=torch.bfloat16)
        step.remember(x[:, :-1], rotation[:, :-1], cache[:, :-1])
        bias = torch.zeros(3, 1, 9, dtype=torch.bfloat16)
        got = step.step(x[:, -1], torch.zeros_like(x[:, -1]), rotation[:, -1:].expand(3, -1, -1), cache, bias, 8)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()

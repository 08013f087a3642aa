"""A stack applied several times: the formula, its counts, and decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.generate.decode import Decoder
from model.init import init_weights
from model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    n_routed_experts=8, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.25,
)  # fmt: skip
SOFTMAX = {"scoring_func": "softmax", "routed_scaling_factor": 2.0}
DECODED = {
    "recursion": {"recursion_depth": 3},
    "dyt": {"norm": "dyt"},
    "scales of the residual stream": {"residual_scales": True},
    "value embeddings": {"value_embeddings": True},
    "value embeddings and recursion": {"value_embeddings": True, "recursion_depth": 2},
    "scales and recursion": {"residual_scales": True, "recursion_depth": 2},
    "recursion, dyt, grouped attention": {
        "recursion_depth": 2, "norm": "dyt", "attention": "gqa", "num_key_value_heads": 1, "head_dim": 8,
    },
    "softmax, greedy": {"topk_method": "greedy", "norm_topk_prob": False, **SOFTMAX},
    "softmax, groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, **SOFTMAX},
}  # fmt: skip


def build(**changes) -> Transformer:
    config = replace(TINY, **changes)
    model = Transformer(config)
    init_weights(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("recursion.weight", ".bias", ".alpha", "residual.weight")):
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return model.eval()


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_every_pass_adds_its_scaled_difference():
    model = build(recursion_depth=3)
    rotation, mask = model.context(None, 12)
    hidden = model.embed_tokens(tokens())
    for scale in model.recursion.weight:
        after = hidden
        for block in model.layers.values():
            after = block(after, rotation, mask)
        hidden = hidden + scale * (after - hidden)
    torch.testing.assert_close(model(tokens()), model.lm_head(model.norm(hidden)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_at_depth_one_there_is_no_scale_and_the_first_pass_of_more_is_the_stack_itself():
    once, twice = build(), Transformer(replace(TINY, recursion_depth=2))
    assert once.recursion is None and not any("recursion" in name for name in once.state_dict())
    init_weights(twice, twice.config, seed=1)
    assert torch.equal(twice.recursion.weight, torch.tensor([[1.0], [0.5]]).expand(2, TINY.hidden_size))
    rotation, mask = once.context(None, 12)
    hidden = once.embed_tokens(tokens())
    stack = hidden
    for block in twice.layers.values():
        stack = block(stack, rotation, mask)
    first = twice.recursion(hidden, stack, 0)
    assert torch.equal(first, once.run_layers(hidden, rotation, mask))


def test_counts_and_flops():
    config = replace(TINY, recursion_depth=3)
    assert sum(p.numel() for p in Transformer(config).parameters()) == config.num_params()
    assert config.num_params() - TINY.num_params() == 3 * TINY.hidden_size
    stack = sum(TINY.layer_params(layer, active=True) for layer in range(TINY.num_hidden_layers))
    scores = TINY.num_hidden_layers * TINY.num_attention_heads * (TINY.qk_head_dim + TINY.v_head_dim) * 16 // 2
    more = config.flops_per_token(16) - TINY.flops_per_token(16)
    assert more == 6 * (2 * (stack + scores) + 3 * TINY.hidden_size)


def test_experts_count_every_pass():
    model = build(recursion_depth=3).train()
    model(tokens())
    assert model.layers["1"].mlp.gate.load.sum() == 3 * 2 * 12 * TINY.num_experts_per_tok


def test_a_pipeline_stage_of_a_stack_that_is_applied_again_is_refused():
    with pytest.raises(ValueError, match=r"recursion_depth=2 with layers 0 to 0 of 2: .* Use one pipeline stage"):
        Transformer(replace(TINY, recursion_depth=2), range(0, 1))


@pytest.mark.parametrize("kind", DECODED)
def test_cached_logits_equal_uncached_logits(kind):
    model = build(**DECODED[kind])
    decoder = Decoder(model)
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    logits, cache = decoder.prefill(rows, capacity=6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for row, got in zip(rows, logits, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(got, model(torch.tensor([row]))[0, -1], rtol=1e-5, atol=1e-5)
        new = torch.randint(0, 48, (3,), generator=generator)
        logits = decoder.step(new, cache)
        rows = [[*row, int(token)] for row, token in zip(rows, new, strict=True)]


@pytest.mark.parametrize("kind", DECODED)
def test_a_changed_token_changes_nothing_before_it(kind):
    model, before = build(**DECODED[kind]), tokens()
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % TINY.vocab_size
    with torch.no_grad():
        first, second = model(before), model(after)
    torch.testing.assert_close(first[:, :7], second[:, :7], rtol=1e-5, atol=1e-6)
    assert (first[:, 7] - second[:, 7]).abs().max() > 1e-3

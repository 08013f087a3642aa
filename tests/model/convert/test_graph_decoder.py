"""The decoder in operations that graphs have gives our model's logits, prompts whole and tokens behind a cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.config import ModelConfig, RopeScaling
from model.convert.graph_decoder import GraphDecoder, cache_width, num_caches
from model.init import init_weights
from model.transformer import Transformer

BASE = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=12,
    n_routed_experts=8, max_position_embeddings=64, initializer_range=0.15, head_dim=8, index_n_heads=4,
    index_head_dim=8,
)  # fmt: skip
V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "n_group": 4, "topk_group": 2}
MODELS: dict[str, dict] = {
    "mla": {},
    "without q_lora_rank": {"q_lora_rank": None},
    "groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5},
    "v2": V2 | {"topk_method": "group_limited_greedy"},
    "v2 greedy": V2 | {"topk_method": "greedy", "n_shared_experts": 0},
    "yarn": {"rope_scaling": RopeScaling(4.0, 16)},
    "dsa": {"attention": "dsa", "index_topk": 8},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mha": {"attention": "mha"},
    "mqa": {"attention": "mqa"},
    "sliding": {"attention": "sliding", "sliding_window": 6, "global_stride": 5},
    "dyt": {"norm": "dyt"},
    "recursion": {"recursion_depth": 2},
    "residual scales": {"residual_scales": True},
    "value embeddings": {"value_embeddings": True},
    "value embeddings, dsa": {"value_embeddings": True, "attention": "dsa", "index_topk": 8},
    "value embeddings, mqa": {"value_embeddings": True, "attention": "mqa"},
    "cope": {"position": "cope", "cope_positions": 20},
    "gqa, cope": {"attention": "gqa", "num_key_value_heads": 2, "position": "cope", "cope_positions": 20},
}


def made(changes: dict) -> Transformer:
    """Random weights; what starts at zero does not."""
    config = dataclasses.replace(BASE, **changes)
    model = Transformer(config).eval()
    init_weights(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "position_embedding")) or "value_embedding.gate" in name:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def nothing(config: ModelConfig, batch: int) -> torch.Tensor:
    return torch.zeros(num_caches(config), batch, 0, cache_width(config))


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_are_the_models_whole_and_behind_a_cache(name):
    model = made(MODELS[name])
    graph, config = GraphDecoder(model), model.config
    ids = torch.randint(0, config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    expected, seen = model(ids), torch.ones_like(ids)
    whole, _ = graph(ids, seen, nothing(config, 3))
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
    parts, past, begin = [], nothing(config, 3), 0
    for end in (25, 26, 40):
        logits, past = graph(ids[:, begin:end], seen[:, :end], past)
        parts.append(logits)
        begin = end
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-4)
    assert past.shape == (num_caches(config), 3, 40, cache_width(config))


@pytest.mark.parametrize("name", ["mla", "dsa", "sliding"])
@torch.inference_mode()
def test_padding_before_a_row_changes_nothing(name):
    model = made(MODELS[name])
    ids = torch.randint(0, model.config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
    padded, seen = torch.nn.functional.pad(ids, (7, 0)), torch.nn.functional.pad(torch.ones_like(ids), (7, 0))
    logits, _ = GraphDecoder(model)(padded, seen, nothing(model.config, 1))
    torch.testing.assert_close(logits[:, 7:], model(ids), rtol=0, atol=1e-4)

"""Slots give every request what `generate` gives it, whenever it joins and whatever is beside it."""

from __future__ import annotations

import random

import pytest
import torch

from model.config import ModelConfig
from model.generate.decode import generate
from model.generate.decoder import Decoder
from model.generate.sampler import Sampling
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.serving.slots import SlotRequest, Slots, Written

BASE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, max_position_embeddings=96, initializer_range=0.2,
)  # fmt: skip
KINDS = {
    "mla": {},
    "cope": {"position": "cope"},
    "sliding": {"attention": "sliding", "sliding_window": 8, "num_key_value_heads": 1},
    "recursion": {"recursion_depth": 2},
    "residual scales": {"residual_scales": True},
    "value embeddings": {"value_embeddings": True},
}


def decoder(kind: str) -> Decoder:
    config = ModelConfig(**(BASE | KINDS[kind]))
    model = Transformer(config)
    init_weights(model, config, seed=3)
    return Decoder(model.eval().requires_grad_(False))


def requests(count: int) -> list[tuple[list[int], int, Sampling, int]]:
    chance = random.Random(7)
    out = []
    for i in range(count):
        prompt = [chance.randrange(64) for _ in range(chance.randint(1, 30))]
        sampling = chance.choice([Sampling(0.0), Sampling(1.0), Sampling(0.7, top_k=9), Sampling(1.0, top_p=0.8)])
        out.append((prompt, chance.randint(1, 60), sampling, i))
    out[4] = out[3]  # a prompt that is asked twice
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_join_at_any_time_get_the_tokens_of_generate(kind):
    model = decoder(kind)
    slots, asked = Slots(model, 4), requests(14)
    got: list[list[int]] = [[] for _ in asked]
    eos, chance, waiting = 5, random.Random(1), list(range(len(asked)))

    def take(i: int):
        def add(written: Written) -> bool:
            got[i].append(written.token)
            return written.token != eos

        return add

    while waiting or slots.used:
        joining = [waiting.pop(0) for _ in range(min(chance.randint(0, slots.free), len(waiting)))]
        if joining:
            slots.add([SlotRequest(*asked[i], take(i)) for i in joining])
        slots.step()
    for (prompt, limit, sampling, seed), tokens in zip(asked, got, strict=True):
        [expected] = generate(
            model, [prompt], max_new_tokens=limit, eos_ids={eos}, temperature=sampling.temperature,
            top_k=sampling.top_k, top_p=sampling.top_p, seeds=[seed],
        )  # fmt: skip
        assert tokens == expected.tokens


def test_log_probabilities_are_the_models_own():
    model = decoder("mla")
    slots, got = Slots(model, 1), []
    prompt = [1, 2, 3]
    slots.add([SlotRequest(prompt, 3, Sampling(0.5), 0, lambda w: not got.append(w), top=2)])
    while slots.used:
        slots.step()
    for i, written in enumerate(got):
        ids = torch.tensor([prompt + [w.token for w in got[:i]]])
        expected = torch.log_softmax(model.model(ids)[0, -1], -1)
        assert written.logprob == pytest.approx(float(expected[written.token]), abs=1e-5)
        assert [t for t, _ in written.likeliest] == expected.topk(2).indices.tolist()

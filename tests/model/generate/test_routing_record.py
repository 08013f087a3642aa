"""The experts that decoding chose, used again by a forward pass over the whole text, give the sampler's own numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.generate.decode import Completion, Decoder, generate
from model.generate.stopping import ThinkBudget
from model.moe.replay import columns
from model.transformer import Transformer
from tests.model.generate.models import KINDS, PROMPTS, TINY, build, build_agreeing

WAYS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "waves": {"max_batch": 2},
    "think budget": {"think": ThinkBudget(3, (9,), (10, 11))},
    "speculative": {"speculative": True},
    "speculative, think budget": {"speculative": True, "think": ThinkBudget(3, (9,), (10, 11))},
}
THINKING = [[1, 2, 9], [4], [5, 6, 7, 8, 9, 10, 11], [4, 9], [1, 2, 9]]


def sample(model: Transformer, **options) -> list[Completion]:
    return generate(Decoder(model), THINKING, max_new_tokens=12, eos_ids={3}, record_routing=True, **options)


@torch.no_grad()
def disturb(model: Transformer) -> None:
    """Move the balancing biases, which decide the choice of experts and nothing else."""
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(bias.flip(0))


@torch.no_grad()
def logprobs(model: Transformer, prompt: list[int], done: Completion, *, replay: bool) -> torch.Tensor:
    """Of the answer's tokens, by one pass over the whole text."""
    text = torch.tensor([prompt + done.tokens])
    routing = done.routing[None].long() if replay else None
    logits = model(text[:, :-1], None, routing)[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(1, text[0, len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("way", WAYS)
def test_replayed_logprobs_are_the_samplers_though_free_routing_has_become_another(way):
    model = build_agreeing(TINY) if WAYS[way].get("speculative") else build(TINY)
    answers = sample(model, **WAYS[way])
    disturb(model)
    apart = 0.0
    for prompt, done in zip(THINKING, answers, strict=True):
        assert done.routing.shape == (len(prompt) + len(done.tokens) - 1, columns(TINY))
        assert done.routing.min() >= 0 and done.routing.max() < TINY.n_routed_experts
        mine = torch.tensor(done.logprobs)
        torch.testing.assert_close(logprobs(model, prompt, done, replay=True), mine, rtol=0, atol=1e-5)
        apart = max(apart, float((logprobs(model, prompt, done, replay=False) - mine).abs().max()))
    assert apart > 1e-2
    if "think" in WAYS[way]:
        assert any(any(done.forced) for done in answers)
    if "speculative" in WAYS[way]:
        assert sum(done.accepted for done in answers) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_records_what_a_pass_over_the_text_chooses(kind):
    model = build(KINDS[kind])
    for prompt, done in zip(THINKING, sample(model), strict=True):
        mine = torch.tensor(done.logprobs)
        torch.testing.assert_close(logprobs(model, prompt, done, replay=True), mine, rtol=0, atol=1e-5)


def test_recording_changes_no_answer_and_leaves_nothing_behind():
    decoder = Decoder(build(TINY))
    plain = generate(decoder, PROMPTS, max_new_tokens=8, eos_ids={3})
    noted = generate(decoder, PROMPTS, max_new_tokens=8, eos_ids={3}, record_routing=True)
    assert [(a.tokens, a.logprobs) for a in plain] == [(b.tokens, b.logprobs) for b in noted]
    assert all(a.routing is None for a in plain) and all(b.routing is not None for b in noted)
    assert not any(layer.router._forward_hooks for layer in decoder.layers if layer.router is not None)


def test_a_model_that_routes_nothing_has_nothing_to_record():
    model = build(dataclasses.replace(TINY, first_k_dense_replace=3))
    assert all(done.routing is None for done in sample(model))

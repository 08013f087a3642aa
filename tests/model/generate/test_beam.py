"""Beam search finds what transformers' finds, and with enough beams what there is to find."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from model.convert.hf_config import to_hf
from model.convert.names import to_published
from model.generate.beam import beam_search
from model.generate.decode import Decoder, generate
from model.transformer import Transformer
from tests.model.generate.models import KINDS, PROMPTS, TINY, build


def logprobs_of(model: Transformer, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize(("num_beams", "length_penalty"), [(1, 1.0), (2, 1.0), (4, 1.0), (4, 0.0), (3, 2.0)])
def test_answers_and_scores_are_transformers(num_beams, length_penalty):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = dataclasses.replace(TINY, num_nextn_predict_layers=0)
    model = build(config)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf(config))).float().eval()
    theirs.load_state_dict(load_like(theirs, to_published(config, model.state_dict())))
    eos = {5, 30}
    ours = beam_search(
        Decoder(model), PROMPTS[:4], num_beams=num_beams, max_new_tokens=14, eos_ids=eos, length_penalty=length_penalty
    )
    for prompt, found in zip(PROMPTS, ours, strict=False):
        out = theirs.generate(
            torch.tensor([prompt]), num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=14,
            eos_token_id=sorted(eos), pad_token_id=0, do_sample=False, length_penalty=length_penalty,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        expected = [row[len(prompt) :].tolist() for row in out.sequences]
        for hypothesis, answer in zip(found, expected, strict=True):
            length = next((i + 1 for i, token in enumerate(answer) if token in eos), len(answer))
            assert hypothesis.completion.tokens == answer[:length]  # behind it is padding
            assert hypothesis.completion.finished == (hypothesis.completion.tokens[-1] in eos)
        if num_beams > 1:
            torch.testing.assert_close(torch.tensor([h.score for h in found]), out.sequences_scores)


def load_like(theirs: torch.nn.Module, published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 keeps a layer's experts stacked, as we do; its files do not."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name in published:
            state[name] = published[name]
            continue
        prefix, kind = name.rsplit(".", 1)
        experts = range(tensor.shape[0])
        if kind == "gate_up_proj":
            pairs = ([published[f"{prefix}.{e}.{half}_proj.weight"] for half in ("gate", "up")] for e in experts)
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        else:
            state[name] = torch.stack([published[f"{prefix}.{e}.{kind}.weight"] for e in experts])
    return state


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_with_beams_for_every_beginning_it_is_an_exhaustive_search(length_penalty):
    model = build(dataclasses.replace(TINY, vocab_size=4))
    prompt, length = [1, 2], 3
    found = beam_search(
        Decoder(model), [prompt], num_beams=16, max_new_tokens=length, eos_ids=set(), length_penalty=length_penalty
    )[0]
    exact = {
        answer: float(logprobs_of(model, prompt, list(answer)).sum())
        for answer in itertools.product(range(4), repeat=length)
    }
    best = sorted(exact, key=lambda answer: -exact[answer])[:16]
    assert [tuple(h.completion.tokens) for h in found] == best
    scores = torch.tensor([exact[answer] / length**length_penalty for answer in best])
    torch.testing.assert_close(torch.tensor([h.score for h in found]), scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_the_uncached_models_and_one_beam_is_greedy(kind):
    model = build(KINDS[kind])
    decoder = Decoder(model)
    for prompt, found in zip(
        PROMPTS, beam_search(decoder, PROMPTS, num_beams=3, max_new_tokens=10, eos_ids={7}), strict=True
    ):
        for h in found:
            expected = logprobs_of(model, prompt, h.completion.tokens)
            torch.testing.assert_close(torch.tensor(h.completion.logprobs), expected, rtol=1e-4, atol=1e-5)
            assert h.score == pytest.approx(float(expected.mean()), rel=1e-4)
    greedy = generate(decoder, PROMPTS, max_new_tokens=10, eos_ids={7}, temperature=0)
    single = beam_search(decoder, PROMPTS, num_beams=1, max_new_tokens=10, eos_ids={7})
    for expected, [hypothesis] in zip(greedy, single, strict=True):
        assert hypothesis.completion.tokens == expected.tokens


def test_answers_end_with_the_context():
    found = beam_search(Decoder(build(TINY)), [[1] * 61], num_beams=2, max_new_tokens=30, eos_ids=set())
    assert [len(h.completion.tokens) for h in found[0]] == [3, 3]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1]], {"num_beams": 0}, "num_beams=0, max_new_tokens=3: both must be at least 1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"eos_ids": set(range(48))}, "keeps 98 candidates with 48 end tokens: a vocabulary of 48"),
    ],
)
def test_impossible_searches_are_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(Decoder(build(TINY)), prompts, **({"num_beams": 2, "max_new_tokens": 3, "eos_ids": {7}} | options))

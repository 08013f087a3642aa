"""Several tokens at once give what one token at a time gives, and so do the MTP modules over their cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generate.cache import KVCache
from model.generate.decoder import Decoder
from model.generate.drafter import Drafter, realign
from model.generate.extend import extend
from model.generate.sampler import Sampling
from model.generate.transcript import Request, Rules, Transcript
from model.transformer import Transformer
from tests.model.generate.models import KINDS, PROMPTS, TINY, build


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [1, 3])  # 45 tokens at once take the sorted experts' path, 15 the dense one
@torch.no_grad()
def test_logits_and_hidden_states_are_the_uncached_models(kind, copies):
    model = build(KINDS[kind])
    decoder = Decoder(model)
    prompts = [list(p) for p in PROMPTS * copies]
    _, cache = decoder.prefill(prompts, 10)
    generator = torch.Generator().manual_seed(0)
    for n in (3, 1, 3):
        tokens = torch.randint(0, 48, (len(prompts), n), generator=generator)
        logits, hidden = extend(decoder, tokens, cache)
        for i, row in enumerate(prompts):
            row += tokens[i].tolist()
            if i < len(PROMPTS):
                expected = model(torch.tensor([row]))[0, -n:]
                torch.testing.assert_close(logits[i], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.lm_head(hidden), logits, rtol=1e-5, atol=1e-5)
    # A single step goes on where several tokens ended.
    step = decoder.step(torch.tensor([7] * len(prompts)), cache)
    torch.testing.assert_close(step[0], model(torch.tensor([[*prompts[0], 7]]))[0, -1], rtol=1e-5, atol=1e-5)


def test_drafts_may_go_past_the_end_of_the_context():
    decoder = Decoder(build(TINY))
    _, cache = decoder.prefill([[1] * 63], 4)
    logits, _ = extend(decoder, torch.tensor([[1, 2, 3]]), cache)
    assert bool(logits.isfinite().all())


def test_half_precision_stays_close():
    model = build(TINY)
    tokens = torch.tensor([[3, 4, 5]] * len(PROMPTS))
    logits = []
    for cast in (model.float, model.bfloat16):
        decoder = Decoder(cast())
        logits.append(extend(decoder, tokens, decoder.prefill(PROMPTS, 5)[1])[0])
    assert logits[1].dtype == torch.bfloat16
    assert float((logits[1] - logits[0]).abs().mean()) < 0.1 * float(logits[0].abs().mean())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_realigned_rows_keep_their_tokens(data):
    """A cache whose features are the tokens' own numbers, so that what is where can be read off."""
    rows, columns, lead = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 9)), data.draw(st.integers(0, 2))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, columns - lead), min_size=rows, max_size=rows)))
    padding = columns - lengths
    content = torch.arange(rows * columns).view(rows, columns, 1).float()
    old = KVCache([content.clone(), -content], padding, columns)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
    kept = torch.tensor([data.draw(st.integers(1, int(lengths[r]))) for r in chosen])
    new = realign(old, chosen, kept, lead)
    assert new.length == int(kept.max()) + lead and torch.equal(new.padding, new.length - kept)
    assert int(new.padding.min()) == lead and torch.equal(new.positions, kept)
    for i, (row, n) in enumerate(zip(chosen.tolist(), kept.tolist(), strict=True)):
        for layer, sign in zip(new.layers, (1, -1), strict=True):
            first = int(padding[row])
            text = layer[i, int(new.padding[i]) : new.length]
            assert torch.equal(text, sign * content[row, first : first + n])
        assert torch.equal(new.bias[i, 0, : new.length].isinf(), torch.arange(new.length) < new.padding[i])


def test_dropping_the_same_number_of_tokens_everywhere_copies_nothing():
    old = KVCache([torch.zeros(2, 8, 1)], torch.tensor([0, 2]), 8)
    assert realign(old, None, torch.tensor([6, 4]), 0) is old and old.length == 6


@torch.no_grad()
def uncached_drafts(model: Transformer, row: list[int], depth: int) -> list[torch.Tensor]:
    """Logits of the drafts behind a row, each module reading the drafts of those before it."""
    out = []
    for k in range(1, depth + 1):
        # Module k at the last position of the model, len(row) - 2, reads token len(row) - 2 + k.
        tokens = torch.tensor([row + [int(x.argmax()) for x in out]])
        hidden = model.norm(model.run_layers(model.embed_tokens(tokens), *model.context(None, tokens.shape[1])))
        states = model.predict_ahead(hidden, model.embed_tokens(tokens), None)
        out.append(model.lm_head(states[k - 1][0, len(row) - 2]))
    return out


@pytest.mark.parametrize(
    ("kind", "depth"), [*((kind, depth) for kind in KINDS for depth in (1, 2)), ("mla", 3), ("gqa", 4)]
)
@torch.no_grad()
def test_drafts_are_the_uncached_modules_whatever_was_accepted_before(kind, depth):
    model = build(dataclasses.replace(KINDS[kind], num_nextn_predict_layers=depth))
    decoder, generator = Decoder(model), torch.Generator().manual_seed(0)
    rules = Rules(Sampling(temperature=0), frozenset())
    transcript = Transcript([Request(i, p, 0, 30) for i, p in enumerate(PROMPTS)], rules, 48, decoder.device)
    rows = [[*p, 20 + i] for i, p in enumerate(PROMPTS)]
    drafter = Drafter(decoder, PROMPTS, 30)
    _, cache = decoder.prefill(PROMPTS, 30, drafter.read)
    batch, lengths = torch.arange(len(rows)), cache.positions
    drafter.start(batch, lengths, torch.tensor([row[-1] for row in rows]))
    for settled in ([1, 2, 1, 2, 1], [0, 1, depth + 1, 1, 2], [depth + 1, 1, 0, 2, 1], [1] * 5):
        proposed, drawn_from = drafter.propose(transcript, batch, None)
        for i, row in enumerate(rows):
            for k, expected in enumerate(uncached_drafts(model, row, depth)):
                torch.testing.assert_close(drawn_from[k][i], expected.log_softmax(-1), rtol=1e-4, atol=1e-4)
                assert int(proposed[i, k]) == int(expected.argmax())
        # Other tokens than the drafted ones, so that nothing which depends on drafts may survive.
        last = torch.tensor([[row[-1]] for row in rows])
        tokens = torch.randint(0, 48, (len(rows), depth + 1), generator=generator)
        _, hidden = extend(decoder, torch.cat([last, tokens[:, :-1]], 1), cache)
        drafter.advance(hidden, tokens, torch.tensor(settled))
        lengths = lengths + torch.tensor(settled)
        cache = realign(cache, None, lengths, 0)
        drafter.realign(None, lengths)
        for row, new, n in zip(rows, tokens.tolist(), settled, strict=True):
            row += new[:n]

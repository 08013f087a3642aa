"""Packing loses, doubles and leaks no token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.generate.decode import Completion
from ray_pipeline.data.rows.batch import IGNORE, real_tokens
from ray_pipeline.rollouts.packed_rows import pack_completions, positions, row_length


def made(prompt: list[int], tokens: list[int]) -> Completion:
    return Completion(prompt, tokens, [-float(t) for t in tokens], finished=True)


def test_a_forced_token_is_read_but_not_trained_on():
    forced = Completion([1, 2], [3, 4, 5], [-3.0, -4.0, -5.0], finished=True, forced=[False, True, False])
    batch = pack_completions([forced], torch.tensor([7.0]), 6, pad_id=0)
    assert batch.tokens[0].tolist() == [1, 2, 3, 4, 0, 0]
    assert batch.labels[0].tolist() == [IGNORE, 3, IGNORE, 5, IGNORE, IGNORE]
    assert batch.extras.advantages[0].tolist() == [0, 7, 0, 7, 0, 0]
    assert batch.extras.sampler_logprobs[0].tolist() == [0, -3, 0, -5, 0, 0]


ids = st.lists(st.integers(1, 50), min_size=1, max_size=8)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=10), st.integers(15, 40))
def test_every_completion_is_found_again_whole(pairs, seq_len):
    completions = [made(p, c) for p, c in pairs]
    advantages = torch.arange(len(completions)) + 1.0
    batch = pack_completions(completions, advantages, seq_len, pad_id=0)
    found = []
    for row in range(len(batch)):
        for document in batch.doc_ids[row].unique().tolist():
            at = (batch.doc_ids[row] == document).nonzero().squeeze(1)
            labels = batch.labels[row, at]
            if bool((labels == IGNORE).all()):
                assert bool((batch.tokens[row, at] == 0).all())
                continue
            assert at.tolist() == list(range(int(at[0]), int(at[-1]) + 1))
            supervised = labels != IGNORE
            completion = labels[supervised].tolist()
            whole = [*batch.tokens[row, at].tolist(), completion[-1]]
            start = int(supervised.nonzero()[0])
            assert bool(supervised[start:].all())
            assert whole[start + 1 :] == completion  # position t predicts token t + 1
            assert batch.extras.sampler_logprobs[row, at][supervised].tolist() == [-float(t) for t in completion]
            advantage = batch.extras.advantages[row, at][supervised].unique()
            assert advantage.numel() == 1
            found.append((int(advantage), whole[: start + 1], completion))
    assert sorted(found) == [(i + 1, p, c) for i, (p, c) in enumerate(pairs)]
    assert bool((batch.extras.advantages[batch.labels == IGNORE] == 0).all())
    assert bool((batch.doc_ids[:, 1:] >= batch.doc_ids[:, :-1]).all())


def test_packing_shares_rows():
    batch = pack_completions([made([1, 2], [3, 4, 5])] * 4, torch.ones(4), seq_len=8, pad_id=0)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 1, 2, 3, 4]] * 2
    assert batch.labels.tolist() == [[IGNORE, 3, 4, 5] * 2] * 2


def test_too_long_a_completion_is_refused():
    with pytest.raises(ValueError, match="takes 9 positions: longer than seq_len=8"):
        pack_completions([made([1] * 5, [2] * 5)], torch.ones(1), seq_len=8, pad_id=0)


def test_advantages_must_match():
    with pytest.raises(ValueError, match="3 advantages for 1 completions"):
        pack_completions([made([1], [2])], torch.ones(3), seq_len=8, pad_id=0)


def test_what_is_not_to_be_trained_keeps_its_labels_and_is_marked():
    batch = pack_completions([made([1, 2], [3, 4]), made([5], [6])], torch.ones(2), 6, 0, trained=[False, True])
    assert batch.labels[0].tolist() == [IGNORE, 3, 4, 6, IGNORE, IGNORE]
    assert batch.extras.trained[0].tolist() == [0, 0, 0, 1, 0, 0]


def test_recorded_experts_lie_at_the_tokens_that_went_to_them():
    first, second = made([1, 2], [3, 4]), made([5], [6, 7])
    first.routing = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int16)
    batch = pack_completions([first, second], torch.ones(2), 6, 0)
    assert batch.extras.routing.dtype == torch.int64
    assert batch.extras.routing[0].tolist() == [[0, 1], [2, 3], [4, 5], [-1, -1], [-1, -1], [-1, -1]]


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=10), st.integers(15, 80), st.sampled_from([1, 4, 6]),
       st.booleans())  # fmt: skip
def test_rows_are_as_long_as_takes_the_fewest_operations(pairs, seq_len, multiple, by_documents):
    completions, model = [made(p, c) for p, c in pairs], ModelConfig()
    chosen = row_length(completions, seq_len, model, multiple, by_documents=by_documents)
    lengths = [positions(c) for c in completions]
    assert max(lengths) <= chosen <= seq_len
    assert chosen == seq_len or chosen % multiple == 0

    def operations(length: int) -> int:
        rows = len(pack_completions(completions, torch.zeros(len(completions)), length, pad_id=0))
        attended = sum(lengths) // len(lengths) if by_documents else length
        return rows * length * model.flops_per_token(attended)

    others = [seq_len // count for count in range(1, 9) if seq_len // count >= max(lengths)]
    assert all(operations(chosen) <= operations(n) for n in others if n == seq_len or n % multiple == 0)


def test_one_answer_to_a_row_where_two_would_leave_half_of_it_empty():
    completions = [made([1] * 30, [2] * 71)] * 4

    def length(seq_len: int, multiple: int) -> int:
        return row_length(completions, seq_len, ModelConfig(), multiple, by_documents=True)

    assert length(160, 32) == 128
    assert length(200, 128) == 200  # full rows
    assert length(101, 32) == 101


def test_several_answers_to_a_row_where_attention_meets_each_alone():
    completions = [made([1] * 30, [2] * 71)] * 20
    chosen = [row_length(completions, 1024, ModelConfig(), 32, by_documents=by) for by in (True, False)]
    assert chosen == [512, 320]  # five to a row, or three


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=10), st.integers(15, 40), st.integers(2, 6))
def test_every_token_is_real_and_longer_rows_hold_the_same_completions(pairs, seq_len, multiple):
    completions = [made(p, c) for p, c in pairs]
    batch, longer = (
        pack_completions(completions, torch.ones(len(completions)), seq_len, pad_id=0, multiple=m)
        for m in (1, multiple)
    )
    assert torch.equal(batch.real, real_tokens(batch.doc_ids, batch.labels))
    assert int(batch.real.sum()) == sum(map(positions, completions))
    assert longer.tokens.shape[1] % multiple == 0
    for whole, part in ((longer.tokens, batch.tokens), (longer.labels, batch.labels), (longer.real, batch.real)):
        assert torch.equal(whole[:, :seq_len], part)
    assert not longer.real[:, seq_len:].any() and longer.extras.advantages.shape == longer.tokens.shape

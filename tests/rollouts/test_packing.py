"""Packing loses, doubles and leaks no token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from ray_pipeline.data.batch import IGNORE
from ray_pipeline.rollouts.packing import pack_rollouts, positions, row_length
from ray_pipeline.rollouts.rollout import Rollout


def rollout(prompt: list[int], completion: list[int]) -> Rollout:
    return Rollout(prompt, completion, [-float(t) for t in completion], 0.0, {}, 0, True)


def test_a_forced_token_is_read_but_not_trained_on():
    forced = Rollout([1, 2], [3, 4, 5], [-3.0, -4.0, -5.0], 0.0, {}, 0, True, [False, True, False])
    batch = pack_rollouts([forced], torch.tensor([7.0]), 6, pad_id=0)
    assert batch.tokens[0].tolist() == [1, 2, 3, 4, 0, 0]
    assert batch.labels[0].tolist() == [IGNORE, 3, IGNORE, 5, IGNORE, IGNORE]
    assert batch.extras["advantages"][0].tolist() == [0, 7, 0, 7, 0, 0]
    assert batch.extras["sampler_logprobs"][0].tolist() == [0, -3, 0, -5, 0, 0]


ids = st.lists(st.integers(1, 50), min_size=1, max_size=8)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=10), st.integers(15, 80), st.sampled_from([1, 4, 6]),
       st.booleans())  # fmt: skip
def test_rows_are_as_long_as_takes_the_fewest_operations(pairs, seq_len, multiple, by_documents):
    rollouts, model = [rollout(p, c) for p, c in pairs], ModelConfig()
    chosen = row_length(rollouts, seq_len, model, multiple, by_documents=by_documents)
    lengths = [positions(r) for r in rollouts]
    assert max(lengths) <= chosen <= seq_len
    assert chosen == seq_len or chosen % multiple == 0

    def operations(length: int) -> int:
        rows = len(pack_rollouts(rollouts, torch.zeros(len(rollouts)), length, pad_id=0))
        attended = sum(lengths) // len(lengths) if by_documents else length
        return rows * length * model.flops_per_token(attended)

    others = [seq_len // count for count in range(1, 9) if seq_len // count >= max(lengths)]
    assert all(operations(chosen) <= operations(n) for n in others if n == seq_len or n % multiple == 0)


def test_one_answer_to_a_row_where_two_would_leave_half_of_it_empty():
    rollouts = [rollout([1] * 30, [2] * 71)] * 4

    def length(seq_len: int, multiple: int) -> int:
        return row_length(rollouts, seq_len, ModelConfig(), multiple, by_documents=True)

    assert length(160, 32) == 128
    assert length(200, 128) == 200  # full rows
    assert length(101, 32) == 101


def test_several_answers_to_a_row_where_attention_meets_each_alone():
    rollouts = [rollout([1] * 30, [2] * 71)] * 20
    chosen = [row_length(rollouts, 1024, ModelConfig(), 32, by_documents=by) for by in (True, False)]
    assert chosen == [512, 320]  # five to a row, or three

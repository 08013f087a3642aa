"""The loader is a pure function of (seed, step)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.rows.batch import IGNORE
from ray_pipeline.data.rows.loader import PackedRows, row_order
from ray_pipeline.data.rows.packing import pack_conversations, pack_documents
from ray_pipeline.data.rows.shards import write_rows
from ray_pipeline.errors import UserError


@pytest.fixture
def rows(tmp_path):
    documents = [list(range(1 + 10 * i, 9 + 10 * i)) for i in range(23)]
    write_rows(tmp_path, pack_documents(documents, 7, 0), seq_len=7, vocab_size=512, tokens_per_shard=40)
    return PackedRows(tmp_path)


@given(st.integers(1, 50), st.integers(0, 5), st.integers(1, 16))
def test_each_epoch_visits_every_row_once(total, seed, batch_size):
    steps = -(-3 * total // batch_size)
    order = [i for step in range(steps) for i in row_order(total, seed, step, batch_size)]
    for epoch in range(3):
        assert sorted(order[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_order_differs_by_epoch_and_seed():
    first, second = row_order(64, 0, 0, 64), row_order(64, 0, 1, 64)
    assert first != second and first != row_order(64, 1, 0, 64)


@given(st.integers(0, 40), st.integers(1, 4))
def test_a_step_does_not_depend_on_the_batches_before_it(step, factor):
    whole = row_order(37, 3, step, 4 * factor)
    parts = [i for part in range(factor) for i in row_order(37, 3, step * factor + part, 4)]
    assert whole == parts


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        row_order(0, 0, 0, 4)


def test_a_batch_is_the_same_from_a_fresh_reader(rows):
    ahead = rows.batch(5, 9, 6)
    again = PackedRows(rows.folder).batch(5, 9, 6)
    for name in ("tokens", "labels", "doc_ids"):
        assert torch.equal(getattr(ahead, name), getattr(again, name))


def test_labels_are_the_next_token_within_the_document(rows):
    batch = rows.slice(0, len(rows))
    wanted = batch.labels != IGNORE
    assert batch.tokens.dtype == batch.labels.dtype == batch.doc_ids.dtype == torch.int64
    assert (batch.labels[wanted] == batch.tokens[wanted] + 1).all()
    inner = wanted[:, :-1]
    assert (batch.doc_ids[:, 1:][inner] == batch.doc_ids[:, :-1][inner]).all()


def test_only_masked_tokens_are_targets(tmp_path):
    packed, _ = pack_conversations([([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10, 11], [0, 1, 0])], 7, 0)
    write_rows(tmp_path, packed, seq_len=7, vocab_size=512, tokens_per_shard=100)
    batch = PackedRows(tmp_path).slice(0, 1)
    x = IGNORE
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch.labels.tolist() == [[x, 7, 8, x, 10, x, x]]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_slice_keeps_stored_order_and_ends_at_the_last_row(rows):
    assert torch.equal(rows.slice(2, 4).tokens, rows.take([2, 3]).tokens)
    assert len(rows.slice(len(rows) - 1, len(rows) + 5)) == 1


def test_rows_that_are_not_there_are_refused(rows):
    with pytest.raises(IndexError):
        rows.take([len(rows)])


def test_another_row_length_is_refused(rows):
    with pytest.raises(UserError, match=r"rows hold 7 tokens, not the 128 asked for.*--seq-len 7"):
        PackedRows(rows.folder, seq_len=128)
    assert PackedRows(rows.folder, seq_len=7).seq_len == 7

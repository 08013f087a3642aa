"""Batches: which places are padding, and that nothing of a row is lost when batches are cut, filled up and joined."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.rows.batch import IGNORE, Batch, Extras, join_rows
from ray_pipeline.data.rows.loader import rows_to_batch
from ray_pipeline.data.rows.packing import pack_conversations, pack_documents

lengths = st.lists(st.integers(2, 17), min_size=1, max_size=12)


def batch_of(rows: list) -> Batch:
    return rows_to_batch(*(np.stack(field) for field in zip(*rows, strict=True)))


def filled(rows: list, seq_len: int) -> list[int]:
    """Tokens of each row that are inputs: its last one may be a label alone."""
    return [min(seq_len, int((row.tokens > 0).sum())) for row in rows]


@given(lengths, st.integers(8, 20))
def test_of_packed_documents_the_empty_end_of_a_row_is_padding(lengths, seq_len):
    rows = list(pack_documents([[7] * length for length in lengths], seq_len, pad_id=0))
    real = batch_of(rows).real
    assert real.sum(1).tolist() == filled(rows, seq_len)
    assert torch.equal(real, torch.arange(seq_len) < real.sum(1, keepdim=True))


@given(lengths, st.integers(16, 20))
def test_of_packed_conversations_it_is_as_well_and_prompts_are_not(lengths, seq_len):
    rows, _ = pack_conversations([([7] * n, [0] * (n - 1) + [1]) for n in lengths], seq_len, pad_id=0)
    real = batch_of(rows).real
    assert real.sum(1).tolist() == filled(rows, seq_len)
    assert torch.equal(real, torch.arange(seq_len) < real.sum(1, keepdim=True))


def test_added_rows_are_padding_and_cut_rows_keep_what_is():
    batch = Batch(
        torch.ones(3, 4).long(), torch.ones(3, 4).long(), torch.zeros(3, 4).long(), Extras(advantages=torch.ones(3, 4))
    )
    more = batch.pad_rows(5)
    assert batch.real is None and batch.tokens_ahead(0) == more.tokens_ahead(0) == 12
    assert more.real.tolist() == [[True] * 4] * 3 + [[False] * 4] * 2
    assert more.pad_rows(6).real.sum() == 12, "what was padding stays so"
    assert (more.labels[3:] == IGNORE).all() and (more.extras.advantages[3:] == 0).all()
    cut = more.rows(2, 4).to(torch.device("cpu"))
    assert cut.real.tolist() == [[True] * 4, [False] * 4] and len(cut.extras.advantages) == 2
    joined = join_rows([batch, more.rows(3, 5)])
    assert torch.equal(joined.real, more.real) and torch.equal(joined.labels, more.labels)


def test_a_module_that_looks_ahead_counts_tokens_whose_document_goes_on():
    doc_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    labels = torch.tensor([[5, 5, IGNORE, 5, IGNORE, IGNORE, IGNORE, IGNORE]])
    real = torch.tensor([[True] * 5 + [False] * 3])
    batch = Batch(torch.zeros(1, 8).long(), labels, doc_ids, real=real)
    assert [batch.tokens_ahead(depth) for depth in range(4)] == [5, 3, 1, 0]
    whole = Batch(batch.tokens, labels, doc_ids)
    assert [whole.tokens_ahead(depth) for depth in range(4)] == [8, 5, 2, 0]

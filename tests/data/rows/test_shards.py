"""Shards: what is written is read back, and damage is noticed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.packing import pack_documents
from ray_pipeline.data.rows.shards import read_manifest, write_rows
from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import write_sealed


def write(folder, *, documents=None, seq_len=7, vocab_size=512, tokens_per_shard=24):
    documents = documents or [list(range(1, 30)), list(range(40, 90))]
    rows = list(pack_documents(documents, seq_len, 0))
    write_rows(folder, rows, seq_len=seq_len, vocab_size=vocab_size, tokens_per_shard=tokens_per_shard)
    return rows


@settings(max_examples=20)  # each writes and syncs files
@given(st.integers(1, 200))
def test_rows_come_back_whatever_the_shard_size(tmp_path_factory, tokens_per_shard):
    folder = tmp_path_factory.mktemp("rows")
    rows = write(folder, tokens_per_shard=tokens_per_shard)
    stored = PackedRows(folder)
    assert len(stored) == len(rows)
    batch = stored.slice(0, len(rows))
    assert (batch.tokens.numpy() == np.stack([row.tokens[:-1] for row in rows])).all()
    assert (batch.doc_ids.numpy() == np.stack([row.segments[:-1] for row in rows])).all()
    assert int((batch.labels >= 0).sum()) == stored.manifest.targets


@pytest.mark.parametrize(("vocab_size", "dtype"), [(512, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_tokens_take_two_bytes_where_the_vocabulary_allows(tmp_path, vocab_size, dtype):
    top = vocab_size - 1
    write(tmp_path, documents=[[top, top - 1, top]], vocab_size=vocab_size)
    files = read_manifest(tmp_path).files
    assert {f.dtype for f in files if f.field == "tokens"} == {dtype}
    assert PackedRows(tmp_path).slice(0, 1).tokens[0, :2].tolist() == [top, top - 1]


def test_a_changed_byte_is_named_on_opening(tmp_path):
    write(tmp_path)
    damaged = tmp_path / "00001.tokens.bin"
    data = bytearray(damaged.read_bytes())
    data[5] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=r"00001\.tokens\.bin: damaged: its SHA-256 is not the one"):
        PackedRows(tmp_path)


def test_a_cut_or_missing_file_is_noticed_on_opening(tmp_path):
    write(tmp_path)
    file = tmp_path / "00000.mask.bin"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"00000\.mask\.bin: damaged: {size - 1} bytes, written were {size}"):
        PackedRows(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"00000\.mask\.bin: missing"):
        PackedRows(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "files": [{}]}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    write(tmp_path)
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.json: damaged"):
        PackedRows(tmp_path)


def test_another_format_is_refused(tmp_path):
    write(tmp_path)
    manifest = json.loads((tmp_path / "rows.json").read_text())
    write_sealed(tmp_path / "rows.json", manifest | {"format": 99})
    with pytest.raises(UserError, match="format 99 is not the 1"):
        PackedRows(tmp_path)


def test_a_folder_without_manifest_was_not_finished(tmp_path):
    with pytest.raises(UserError, match=r"rows\.json: no such file"):
        PackedRows(tmp_path)


def test_writing_again_leaves_no_manifest_of_the_old_rows_when_it_breaks(tmp_path):
    write(tmp_path)

    def broken():
        yield from pack_documents([[1, 2, 3]], 7, 0)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_rows(tmp_path, broken(), seq_len=7, vocab_size=512, tokens_per_shard=8)
    assert not (tmp_path / "rows.json").exists()

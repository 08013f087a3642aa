"""What people see of a batch is what is trained."""

from __future__ import annotations

import pytest

from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.rows.inspect import CONTEXT, SUPERVISED, render_rows
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.packing import pack_conversations, pack_documents
from ray_pipeline.data.rows.shards import write_rows

SEQ_LEN = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tokenizer = save_trained(train_bpe(["what is two and two? it is four, not five. é"] * 9, 400), path / "tokenizer")
    chats = [
        tokenizer.encode_chat([{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for q, a in (("two and two?", "<think>é</think>four"), ("is it five?", "not five"))
    ]
    rows, dropped = pack_conversations(chats, SEQ_LEN, tokenizer.pad_id)
    assert not dropped and len(rows) == 1
    options = {"seq_len": SEQ_LEN, "vocab_size": len(tokenizer), "tokens_per_shard": 10_000}
    write_rows(path / "sft" / "train", rows, **options)
    documents = [tokenizer.encode_document("it is four " * 20)]
    write_rows(path / "pretrain" / "train", pack_documents(documents, SEQ_LEN, tokenizer.pad_id), **options)
    return path


def styled(text, style):
    return "".join(text.plain[span.start : span.end] for span in text.spans if span.style == style)


def test_supervised_tokens_boundaries_and_padding_are_marked(folder):
    from ray_pipeline.data.chat.tokenizer import load_tokenizer

    [row] = render_rows(PackedRows(folder / "sft" / "train").slice(0, 1), load_tokenizer(folder / "tokenizer"))
    eos = "<｜end▁of▁sentence｜>"
    assert styled(row, SUPERVISED) == f"<think>é</think>four{eos}not five{eos}"
    assert "two and two?" in styled(row, CONTEXT) and "four" not in styled(row, CONTEXT)
    assert row.plain.count("│") == 2 and row.plain.rstrip().endswith("padding")


def test_pretraining_rows_supervise_all_but_the_first_token(folder):
    from ray_pipeline.data.chat.tokenizer import load_tokenizer

    batch = PackedRows(folder / "pretrain" / "train").slice(0, 1)
    [row] = render_rows(batch, load_tokenizer(folder / "tokenizer"))
    assert f"{SEQ_LEN} of {SEQ_LEN} targets" in row.plain
    assert styled(row, CONTEXT) == "<｜begin▁of▁sentence｜>"
    assert "padding" not in row.plain

"""Chosen documents become rows, and a broken attempt goes on to the same bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.packing import Position, pack_documents, pack_placed
from ray_pipeline.data.shared.cleaning import content_hash
from ray_pipeline.data.text import text_rows
from ray_pipeline.data.text.builtin_text import document_at
from ray_pipeline.data.text.mixture import Choice
from ray_pipeline.data.text.text_rows import BlockTokenizer, State, TextRows
from ray_pipeline.settings.schema import DataConfig, PipelineFields, SourceConfig
from tests.data.text.test_corpus import made

TEXTS = [(0, document_at(0, i)) for i in range(40)] + [(1, document_at(1, i)) for i in range(90)]
SETTINGS = {"seq_len": 64, "tokens_per_shard": 1000, "validation_fraction": 0.1, "max_epochs": 2.5}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_trained(train_bpe([text for _, text in TEXTS], 400), tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def config():
    sources = [SourceConfig(name="a.txt", weight=1.0), SourceConfig(name="b.txt", weight=1.0, licence="CC0")]
    return PipelineFields(data=DataConfig(pretrain=sources, **SETTINGS))


@pytest.fixture
def choice(tmp_path, config):
    return Choice(made(tmp_path / "work", TEXTS, 3000), config.data)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """What the workers do, here: how blocks are spread is tested beside `map_blocks`."""
    monkeypatch.setattr(text_rows, "map_blocks", lambda make, arguments, blocks: map(make(*arguments), blocks))


def silent(phase, done, total, unit=""):
    pass


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_are_the_packed_documents_of_the_choice(tmp_path, config, choice, tokenizer):
    written = TextRows(config, choice, tokenizer, tmp_path / "record.npz").write(tmp_path / "pretrain", silent)
    documents = {False: [], True: []}
    for validation, of in documents.items():
        for number, wanted in choice.visits(validation=validation):
            texts = choice.corpus.texts(number, wanted)
            of += [(choice.corpus.source(number), tokenizer.encode_document(text)) for text in texts]
    rows = PackedRows(tmp_path / "pretrain" / "train")
    expected = [row for row, _, _ in pack_placed(documents[False], 64, tokenizer.pad_id)]
    assert rows.slice(0, len(rows)).tokens.tolist() == [row.tokens[:-1].tolist() for row in expected]
    entry, held = written.datasets["pretrain/train"], written.datasets["pretrain/validation"]
    assert entry["tokens"] == sum(len(ids) for _, ids in documents[False]) == sum(s["tokens"] for s in entry["sources"])
    assert held["tokens"] == sum(len(ids) for _, ids in documents[True])
    assert entry["sources"][1]["tokens"] == sum(len(ids) for source, ids in documents[False] if source)
    assert entry["sources"][0]["uses"] > 2 * entry["sources"][0]["documents"]
    assert (entry["sources"][1]["licence"], entry["sources"][1]["read"]) == ("CC0", 90)
    counts = np.bincount(np.concatenate([ids[1:] for _, ids in documents[False]]), minlength=len(tokenizer))
    assert written.counts.tolist() == counts.tolist()
    held_out = PackedRows(tmp_path / "pretrain" / "validation").manifest
    assert [source.name for source in held_out.sources] == ["a", "b"]
    assert not {
        content_hash(t) for _, t in TEXTS if tokenizer.encode_document(t) in [d for _, d in documents[True]]
    } & {content_hash(t) for _, t in TEXTS if tokenizer.encode_document(t) in [d for _, d in documents[False]]}


@pytest.mark.parametrize("at", [1, 4, 9, 17])
def test_an_attempt_that_breaks_goes_on_to_the_same_bytes(tmp_path, monkeypatch, config, choice, tokenizer, at):
    whole = TextRows(config, choice, tokenizer, tmp_path / "one.npz").write(tmp_path / "one" / "pretrain", silent)
    saved = []
    save = State.save

    def breaking(state, path):
        save(state, path)
        saved.append(state.written.rows)
        if len(saved) == at:
            raise RuntimeError("killed")

    monkeypatch.setattr(State, "save", breaking)
    with pytest.raises(RuntimeError):
        TextRows(config, choice, tokenizer, tmp_path / "two.npz").write(tmp_path / "two" / "pretrain", silent)
    monkeypatch.undo()
    monkeypatch.setattr(text_rows, "map_blocks", lambda make, arguments, blocks: map(make(*arguments), blocks))
    again = TextRows(config, choice, tokenizer, tmp_path / "two.npz")
    assert again.state.written.rows == saved[-1] > 0
    again.write(tmp_path / "two" / "pretrain", silent)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert whole.datasets == again.datasets and whole.counts.tolist() == again.counts.tolist()


@pytest.mark.parametrize("row", [4, 33, 97])
def test_one_that_breaks_within_a_shard_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch, config, choice, tokenizer, row
):
    told = []
    whole = TextRows(config, choice, tokenizer, tmp_path / "one.npz").write(
        tmp_path / "one" / "pretrain", lambda *report: told.append(report)
    )
    totals = {
        "tokenising": sum(use.used_bytes for use in choice.sources),
        "tokenising held-out text": sum(use.validation_bytes for use in choice.sources),
    }
    for phase, total in totals.items():
        done = [report[1:] for report in told if report[0] == phase]
        assert done == sorted(done) and done[-1] == (total, total, "bytes")

    def breaking(*arguments):
        yield from itertools.islice(pack_placed(*arguments), row)
        raise RuntimeError("killed")

    monkeypatch.setattr(text_rows, "pack_placed", breaking)
    with pytest.raises(RuntimeError):
        TextRows(config, choice, tokenizer, tmp_path / "two.npz").write(tmp_path / "two" / "pretrain", silent)
    # What atomic writing leaves where the process is killed.
    (tmp_path / "two" / "pretrain" / "train" / f".{row // 15:05d}.tokens.bin.partial").write_bytes(b"half")
    monkeypatch.setattr(text_rows, "pack_placed", pack_placed)
    again = TextRows(config, choice, tokenizer, tmp_path / "two.npz")
    assert again.state.written.rows == row // 15 * 15, "whole shards of 15 rows are kept"
    again.write(tmp_path / "two" / "pretrain", silent)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert whole.datasets == again.datasets and whole.counts.tolist() == again.counts.tolist()


def test_packing_goes_on_from_any_place():
    documents = [(n // 4, list(range(100 * n, 100 * n + 3 + 7 * n))) for n in range(9)]
    rows = list(pack_placed(documents, 10, 0))
    for number, (_, _, place) in enumerate(rows):
        rest = list(pack_placed(documents[place.document :], 10, 0, place.token))
        assert [row.tokens.tolist() for row, _, _ in rest] == [row.tokens.tolist() for row, _, _ in rows[number + 1 :]]
    assert rows[-1][2] == Position(9, 0)
    assert [list(row.tokens) for row in pack_documents([ids for _, ids in documents[:4]], 10, 0)] == [
        list(row.tokens) for row, source, _ in rows if source == 0
    ]


def test_special_strings_in_documents_are_spelled_out(tmp_path, tokenizer):
    corpus = made(tmp_path, [(0, f"a {tokenizer.special['eos_token']} b"), (0, "plain")])
    work = BlockTokenizer(tokenizer.to_json(), tokenizer.bos_id, tokenizer.eos_id)
    lengths, ids = work((corpus.path(0).read_bytes(), np.array([True, False])))
    assert lengths.tolist() == [len(ids)]
    assert ids.tolist() == tokenizer.encode_document(f"a {tokenizer.special['eos_token']} b")
    assert ids.tolist().count(tokenizer.eos_id) == 1

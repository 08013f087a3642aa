"""Sources by name, and every check before anything starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ray_pipeline.data.sources.source_checks import check_sources
from ray_pipeline.data.sources.sources import (
    figure_names,
    parse_source,
    read_conversations,
    read_documents,
    read_questions,
)
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig, PipelineFields, SourceConfig, TokenizerConfig

SHARED = Path(__file__).parents[4] / "shared" / "data"


def config(**data):
    if "text" in data:
        data["pretrain"] = [SourceConfig(name=str(data.pop("text")))]
    return PipelineFields(data=DataConfig(**{k: v if isinstance(v, list) else str(v) for k, v in data.items()}))


@pytest.mark.parametrize(
    ("given", "kind", "location", "split", "column"),
    [
        ("builtin", "builtin", "", "train", None),
        ("some/where.txt", "file", "some/where.txt", "train", None),
        ("./org/name", "file", "org/name", "train", None),
        ("roneneldan/TinyStories", "hub", "roneneldan/TinyStories", "train", None),
        ("roneneldan/TinyStories:validation", "hub", "roneneldan/TinyStories", "validation", None),
        ("org/name-2.0:test:story", "hub", "org/name-2.0", "test", "story"),
    ],
)
def test_names_are_told_apart(given, kind, location, split, column):
    source = parse_source(given)
    assert (source.kind, source.location, source.split, source.column) == (kind, location, split, column)


@pytest.mark.parametrize("given", ["biultin", "gsm8k", "a/b/c", "org/name:a:b:c", ""])
def test_what_is_neither_is_refused(given):
    with pytest.raises(UserError, match='Give "builtin", a .txt, .*file, a folder or glob of such files, or a'):
        parse_source(given)
    with pytest.raises(UserError, match='did you mean "builtin"'):
        parse_source("biultin")


def test_the_builtin_sources_pass():
    check_sources(config())


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text("one\n\ntwo")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    questions = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(5)]
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, questions)))
    questions[3] = {"question": "no answer"}
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "txet.txt"}, r'^--data .*txet\.txt: no such file \(did you mean "text\.txt"\?\)'),
        ({"text": "latin.txt"}, r"^--data .*latin\.txt: byte 3 \(0xe9\) is not UTF-8"),
        ({"sft": "bad.jsonl"}, r'^--sft-data .*bad\.jsonl:4: has "question", .*and "answer": GSM8K'),
        ({"prompts": "bad.jsonl"}, r'^--prompt-data .*bad\.jsonl:4: needs "question" and "answer"'),
        ({"sft": "text.txt"}, r"^--sft-data .*text\.txt: plain text has no questions"),
        ({"prompts": "empty.jsonl"}, r"^--prompt-data .*empty\.jsonl: holds no records"),
    ],
)
def test_a_fault_is_found_before_anything_starts(files, given, message):
    given = {key: files / name for key, name in given.items()}
    with pytest.raises(UserError, match=message):
        check_sources(config(**given))


def test_good_files_pass_and_are_read_in_order(files):
    check_sources(config(text=files / "text.txt", sft=files / "good.jsonl", prompts=files / "good.jsonl"))
    source = parse_source(str(files / "good.jsonl"))
    assert [q.answer for q in read_questions(source)] == ["1", "2", "3", "4", "5"]
    assert [q.category for q in read_questions(source, limit=1)] == ["good"]
    assert [c.question for c in read_conversations(source, limit=2)] == ["0+1?", "1+1?"]
    assert list(read_documents(source, limit=1)) == ["0+1?\n#### 1"]
    assert list(read_documents(parse_source(str(files / "text.txt")))) == ["one\n\ntwo"]


@pytest.mark.parametrize("name", ["shards", "shards/*"])
def test_shards_of_one_source_are_read_in_order_of_their_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    for shard, texts in {"b.jsonl": "de", "a.jsonl": "abc"}.items():
        (Path("shards") / shard).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (Path("shards") / "c.txt").write_text("f<|endoftext|>g")
    (Path("shards") / "README").write_text("not read")
    source = parse_source(name)
    assert list(read_documents(source)) == list("abcdefg")
    assert list(read_documents(source, limit=4)) == list("abcd")
    check_sources(config(text=name))
    with pytest.raises(UserError, match=r"--sft-data .*c\.txt: plain text has no questions"):
        check_sources(config(sft=name))
    (Path("shards") / "d.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"--data .*d\.txt: byte 0 "):
        check_sources(config(text=name))


def test_a_tokenizer_larger_than_the_model_is_refused():
    too_large = PipelineFields(tokenizer=TokenizerConfig(vocab_size=9000))
    with pytest.raises(UserError, match=r"9000 entries but model\.vocab_size=\d+.*--set model\.vocab_size=9000"):
        check_sources(too_large)


def test_a_tokenizer_folder_is_checked(tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer\.json"):
        check_sources(PipelineFields(tokenizer=TokenizerConfig(name=str(tmp_path))))


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="the shared data is not here")
def test_gsm8k_is_read_whole():
    source = parse_source(str(SHARED / "gsm8k" / "test.jsonl"))
    check_sources(config(prompts=source.given, sft=source.given))
    questions = list(read_questions(source))
    assert len(questions) == 1319
    assert all(question.answer.replace(",", "").lstrip("-").isdigit() for question in questions)
    assert not any("<<" in question.steps or "####" in question.steps for question in questions)


@pytest.mark.skipif(not (SHARED / "tinyshakespeare").is_dir(), reason="the shared data is not here")
def test_tinyshakespeare_becomes_hundreds_of_documents():
    source = parse_source(str(SHARED / "tinyshakespeare" / "input.txt"))
    documents = list(read_documents(source))
    assert 400 < len(documents) < 1000
    whole = Path(source.location).read_text()
    assert "".join("".join(documents).split()) == "".join(whole.split())


def test_sources_have_figures_of_names_that_differ_and_that_trackers_take(tmp_path):
    given = ["builtin", str(tmp_path / "sea.txt"), "/elsewhere/sea.jsonl", "org/Tiny Stories:train:text", "", "-/-"]
    names = figure_names(given)
    assert names[:3] == ["builtin", "sea", "sea-2"] and names[3] == "org-Tiny-Stories-train-text"
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]{1,60}", name) for name in names)
    assert len(figure_names(["x" * 400, "x" * 400])[1]) <= 60

"""Columns are read under the names given with the source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.dag.identity import absolute_name, identities
from ray_pipeline.data.files.reading import Tally
from ray_pipeline.data.sources.source_checks import check_sources
from ray_pipeline.data.sources.sources import (
    parse_source,
    read_conversations,
    read_documents,
    read_preferences,
    read_questions,
)
from ray_pipeline.errors import UserError
from ray_pipeline.records.input_files import split_columns
from ray_pipeline.settings.schema import DataConfig, PipelineFields, SourceConfig

ROW = {"Question": "2+2?", "Complex_CoT": "2 and 2", "Response": "4", "meta": {"truth": 4}, "no": "5", "id": 1}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("\n".join(json.dumps(ROW | {"Question": f"{i}+2?"}) for i in range(3)))
    return "a.jsonl"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jsonl", ("a.jsonl", "")),
        ("a.jsonl:prompt=q", ("a.jsonl", "prompt=q")),
        ("org/name:train:text=the story,x=y.z", ("org/name:train", "text=the story,x=y.z")),
        ("lang=en/*.jsonl:text=a", ("lang=en/*.jsonl", "text=a")),
        ("lang=en/a.jsonl", ("lang=en/a.jsonl", "")),
        ("reasoning_gym:countdown:50", ("reasoning_gym:countdown:50", "")),
    ],
)
def test_columns_stand_behind_the_source(name, parts):
    assert split_columns(name) == parts


def test_conversations_questions_pairs_and_documents_are_read_by_given_names(path):
    [first, *_] = read_conversations(parse_source(f"{path}:prompt=Question,response=Response,reasoning=Complex_CoT"))
    assert [m["content"] for m in first.messages] == ["0+2?", "<think>2 and 2</think>4"]
    [asked, *_] = read_questions(parse_source(f"{path}:question=Question,answer=meta.truth"))
    assert (asked.prompt, asked.answer) == ("0+2?", "4")
    [pair, *_] = read_preferences(parse_source(f"{path}:prompt=Question,chosen=Response,rejected=no"))
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("4", "5")
    assert next(read_documents(parse_source(f"{path}:text=Question"))) == "0+2?"
    assert next(read_documents(parse_source(f"{path}:Question"))) == "0+2?"
    hub = parse_source("org/name:validation:prompt=a,response=b")
    assert (hub.kind, hub.location, hub.split) == ("hub", "org/name", "validation")
    assert hub.columns == (("prompt", "a"), ("response", "b"))


def test_columns_without_a_name_are_counted_as_not_read(path):
    tally = Tally()
    list(read_questions(parse_source(f"{path}:question=Question,answer=meta.truth"), tally=tally))
    assert set(tally.unread) == {"Complex_CoT", "Response", "no", "id"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"sft": "a.jsonl:promt=Question"},
            r'nothing is read as "promt" \(did you mean "prompt"\?\), so the column "Ques',
        ),
        ({"sft": "a.jsonl:prompt=Question,prompt=no"}, '"prompt" stands for two columns'),
        (
            {"sft": "a.jsonl:prompt=question,response=Response"},
            r'a\.jsonl:1: has no column "question" to read as "prompt" \(did you mean "Question"\?\)\. Its columns',
        ),
        ({"prompts": "a.jsonl:question=Question,answer=meta.turth"}, 'has no column "meta.turth" to read as "answer"'),
        (
            {"sft": "a.jsonl:prompt=Question,response=Response,question=no"},
            '"question" has no place beside "prompt", "resp',
        ),
        ({"sft": "a.jsonl:Response"}, 'a column alone is for --data. Write "NAME=Response"'),
        ({"text": "a.jsonl:txt=Question"}, 'nothing is read as "txt"'),
    ],
)
def test_wrong_names_are_refused(path, given, message):
    if "text" in given:
        given["pretrain"] = [SourceConfig(name=given.pop("text"))]
    with pytest.raises(UserError, match=message):
        check_sources(PipelineFields(data=DataConfig(**given)))


def test_which_columns_are_read_is_part_of_what_a_run_is(path):
    def key(name):
        return identities(PipelineFields(data=DataConfig(sft=name)))["data_prep"].key

    names = [f"a.jsonl:prompt=Question,response={column}" for column in ("Response", "no")]
    assert len({key(path), *map(key, names)}) == 3
    assert key(absolute_name(names[0])) == key(names[0])
    assert absolute_name(names[0]) == f"{Path('a.jsonl').absolute()}:prompt=Question,response=Response"
    shards = [f"*.jsonl:prompt=Question,response={column}" for column in ("Response", "no")]
    assert key(shards[0]) != key(shards[1]) and key(absolute_name(shards[0])) == key(shards[0])


def test_leaving_records_out_is_part_of_what_a_run_is_and_the_bound_is_not():
    def key(**data):
        return identities(PipelineFields(data=DataConfig(**data)), {})["data_prep"].key

    assert key(on_bad_record="skip") != key()
    assert key(max_bad_records=0.5) == key()

"""Records that cannot be used are told all at once or left out within a bound; what is not read is counted."""

from __future__ import annotations

import json

import pytest

from ray_pipeline.data.files.fields import BadRecord
from ray_pipeline.data.files.reading import Tally, converted, limited
from ray_pipeline.data.sets.question_sets import gather_questions
from ray_pipeline.data.sources.source_checks import check_sources
from ray_pipeline.data.sources.sources import parse_source, read_conversations, read_documents
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig, PipelineFields, SourceConfig


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def pair(number):
    return {"prompt": f"question {number}", "response": "yes", "id": number, "note": None}


@pytest.fixture
def broken(tmp_path):
    """40 conversations, of which six cannot be used, for three reasons."""
    records = [pair(i) for i in range(40)]
    records[3] = records[5] = records[7] = records[9] = pair(0) | {"response": ""}
    records[11], records[13] = '{"prompt": ', {"prompt": "hi", "completion": "no", "label": False}
    return write(tmp_path / "a.jsonl", records)


def test_all_bad_records_are_told_at_once_kind_by_kind(broken):
    with pytest.raises(UserError) as error:
        list(read_conversations(parse_source(str(broken))))
    message = str(error.value)
    places = f"{broken}:4, {broken}:6, {broken}:8, ..."
    assert message.startswith(
        f'{broken}:4: field "response" is empty (4 like it: {places}); {broken}:12: not valid JSON'
    )
    assert f'; {broken}:14: "label" is false' in message
    assert message.endswith(
        "In all 6 of 40 records looked at cannot be used. Fix or remove them, or leave them out with "
        "--set data.on_bad_record=skip."
    )


def test_one_bad_record_ends_the_reading_with_a_way_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(1), pair(2) | {"prompt": 3.0 > 4}])
    with pytest.raises(
        UserError, match=r'a\.jsonl:2: field "prompt" must be text, but is bool\. Fix or remove it, or le'
    ):
        list(read_conversations(parse_source(str(path))))


def test_bad_records_are_left_out_counted_and_listed(broken):
    tally = Tally(skip=True, most=0.2)
    kept = list(read_conversations(parse_source(str(broken)), tally=tally))
    assert len(kept) == 34 and (tally.records, tally.num_bad) == (40, 6)
    facts = tally.facts()
    assert facts["records"] == 40 and facts["not_read"] == {"id": 34} and not facts["cut"]
    assert facts["left_out"][0] == {
        "reason": 'field "response" is empty',
        "records": 4,
        "first": [f"{broken}:{n}" for n in (4, 6, 8)],
    }
    assert tally.notices()[0] == 'not read of its 40 records: "id" (in 34)'
    assert tally.notices()[1].startswith(f"6 of 40 records are left out: {broken}:4: ")


def test_more_bad_records_than_the_bound_end_the_run(broken):
    with pytest.raises(
        UserError, match=r"^6 of 40 records cannot be used, more than data\.max_bad_records=0\.1: .*a\.jsonl:4"
    ):
        list(read_conversations(parse_source(str(broken)), tally=Tally(skip=True, most=0.1)))


def test_a_limit_that_leaves_something_is_told(broken):
    tally = Tally()
    assert len(list(read_conversations(parse_source(str(broken)), 2, tally))) == 2
    assert tally.cut and tally.notices()[-1].startswith("read no further than data.max_documents")
    exact = Tally()
    assert list(limited(iter("ab"), 2, exact)) == ["a", "b"] and not exact.cut


def test_reading_does_not_go_on_for_ever_after_a_fault(monkeypatch):
    monkeypatch.setattr("ray_pipeline.data.files.reading.LOOKED_ON", 10)
    tally = Tally()
    records = ((str(n), BadRecord("bad") if n == 3 else {"a": n}) for n in range(10**9))
    assert list(converted(records, lambda record: record["a"], tally)) == [0, 1, 2]
    assert tally.records == 14


def test_the_check_before_the_run_says_what_is_not_read(broken, tmp_path):
    good = write(tmp_path / "good.jsonl", [pair(i) for i in range(3)])
    data = {
        "sft": str(good),
        "pretrain": [SourceConfig(name=str(write(tmp_path / "t.jsonl", [{"text": "a", "url": "b"}])))],
    }
    assert check_sources(PipelineFields(data=DataConfig(**data))) == [
        f'--data {tmp_path / "t.jsonl"}: not read of its 1 records: "url" (in 1)',
        f'--sft-data {good}: not read of its 3 records: "id" (in 3)',
    ]
    data["sft"] = str(broken)
    with pytest.raises(UserError, match=r"^--sft-data .*In all 6 of 40 records"):
        check_sources(PipelineFields(data=DataConfig(**data)))
    skipped = check_sources(PipelineFields(data=DataConfig(**data, on_bad_record="skip", max_bad_records=0.5)))
    assert len(skipped) == 3 and "6 of 40 records are left out" in skipped[2]


def test_the_setting_reaches_questions_and_conversations(broken, tmp_path):
    questions = [{"question": f"{i}+{i}=?", "answer": str(2 * i)} for i in range(40)] + [
        {"question": "?", "answer": ""}
    ]
    prompts = write(tmp_path / "q.jsonl", questions)
    data = DataConfig(prompts=str(prompts), sft=str(broken), on_bad_record="skip", max_bad_records=0.2)
    sets = gather_questions(PipelineFields(data=data))
    assert {name: tally.num_bad for name, tally in sets.tallies.items()} == {
        f"--prompt-data {prompts}": 1,
        f"--sft-data {broken}": 6,
    }
    assert len(sets.train) + len(sets.heldout) == 40


def test_documents_are_left_out_too(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 3}, "x", {"text": "b"}])
    tally = Tally(skip=True, most=0.5)
    assert list(read_documents(parse_source(str(path)), tally=tally)) == ["a", "b"]
    assert tally.num_bad == 2


def test_a_tally_is_read_back_as_it_was_stored():
    tally = Tally(skip=True, most=0.5, checked=True, records=7, cut=True)
    tally.unread["url"] = 3
    for line in (2, 5):
        tally.add_bad(f"a.jsonl:{line}", BadRecord('field "text" is empty'))
    assert Tally.restored(json.loads(json.dumps(tally.stored()))) == tally

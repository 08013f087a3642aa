"""Pairs of answers: split by question, packed two to a row and never apart, and what the built-in ones prefer."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.chat.tokenizer_files import EOS, save_trained, train_bpe
from ray_pipeline.data.rows.batch import IGNORE
from ray_pipeline.data.rows.loader import row_order
from ray_pipeline.data.rows.preferences import PairRows, heldout_pairs, write_preferences
from ray_pipeline.data.sets.preference_sets import gather_preferences
from ray_pipeline.data.sets.question_sets import gather_questions
from ray_pipeline.data.tasks.mixes import PREFERENCE_MIX, draw_unique, make_question
from ray_pipeline.data.tasks.preference_pairs import SLIP_SHARE, needs_working, preference_answers, slip
from ray_pipeline.data.text.builtin_text import document_at
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig, PipelineFields

SEQ_LEN = 160
DATA = {"builtin_prompts": 100, "heldout_questions": 30, "builtin_conversations": 50, "seq_len": SEQ_LEN}


def config(**data):
    return PipelineFields(data=DataConfig(**(DATA | data)))


def silent(*_):
    """No progress."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_trained(train_bpe([document_at(0, i) for i in range(200)], 400), tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def pairs():
    return gather_preferences(config(), gather_questions(config())).pairs


@pytest.fixture(scope="module")
def written(tokenizer, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    return folder, *write_preferences(config(), pairs, tokenizer, folder, silent)


def documents(batch):
    """{pair: {chosen: (tokens read, tokens trained)}}, from the batch alone."""
    out = {}
    for row in range(len(batch)):
        for document in batch.doc_ids[row].unique().tolist():
            place = batch.doc_ids[row] == document
            [pair], [chosen] = (
                values[row][place].unique().tolist() for values in (batch.extras.pair, batch.extras.chosen)
            )
            labels, tokens = batch.labels[row][place], batch.tokens[row][place]
            trained = labels != IGNORE
            if pair >= 0:
                read = tokens[: trained.nonzero().max() + 1]  # the stop token is only ever a label
                out.setdefault(int(pair), {})[chosen] = (read.tolist(), labels[trained].tolist())
    return out


@given(st.data())
def test_every_pair_of_a_step_is_in_it_once_whole_and_together(written, tokenizer, pairs, data):
    rows = PairRows(written[0] / "train", SEQ_LEN)
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=12))
    batch = rows.take(indices)
    assert batch.tokens.shape == batch.labels.shape == batch.extras.pair.shape == (len(batch), SEQ_LEN)
    found = documents(batch)
    assert sorted(found) == list(range(len(indices)))
    stored = [documents(rows.take([index]))[0] for index in indices]
    assert [found[i] for i in range(len(indices))] == stored
    known = {p.prompt[0]["content"]: (p.chosen[0]["content"], p.rejected[0]["content"]) for p in pairs}
    for both in found.values():
        text = tokenizer.decode(both[1.0][0], keep_special=True)
        question = text.partition("<｜User｜>")[2].partition("<｜Assistant｜>")[0]
        trained = tuple(tokenizer.decode(both[chosen][1], keep_special=True) for chosen in (1.0, 0.0))
        assert trained == tuple(answer + EOS for answer in known[question])
    for row in range(len(batch)):
        for pair in set(batch.extras.pair[row].tolist()) - {-1.0}:
            assert {1.0, 0.0} == set(batch.extras.chosen[row][batch.extras.pair[row] == pair].tolist())


def test_a_step_depends_on_seed_and_number_alone(written):
    rows = PairRows(written[0] / "train")
    one, two = rows.batch(3, 5, 8), PairRows(written[0] / "train").take(row_order(len(rows), 3, 5, 8))
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.extras.pair, two.extras.pair)
    assert len(rows.batch(3, 5, 8)) < 8, "several pairs share a row"


def test_the_validation_pairs_can_be_walked_in_order(written):
    rows = PairRows(written[0] / "validation")
    assert documents(rows.slice(1, 3))[0] == documents(rows.take([1]))[0]
    assert len(documents(rows.slice(0, 1000))) == len(rows)


def test_counts_and_manifest_entries_are_true(written, pairs):
    folder, datasets, counts = written
    train, held = (PairRows(folder / name) for name in ("train", "validation"))
    assert len(train) + len(held) + counts["preference_pairs_too_long"] == len(pairs) == 130
    assert (counts["preference_pairs_train"], counts["preference_pairs_validation"]) == (len(train), len(held))
    assert len(held) == (130 - counts["preference_pairs_too_long"]) // 5
    entry = datasets[f"{folder.name}/train"]
    assert (entry["rows"], entry["documents"]) == (len(train), 2 * len(train))
    assert entry["targets"] == train.manifest.targets


def test_pairs_longer_than_a_row_are_dropped_and_counted(tokenizer, pairs, tmp_path):
    _, counts = write_preferences(config(seq_len=56), pairs, tokenizer, tmp_path, silent)
    assert 0 < counts["preference_pairs_too_long"] < len(pairs)
    with pytest.raises(UserError, match=r"data\.preferences=builtin: 0 of 130 pairs fit into seq_len=8 .*--seq-len"):
        write_preferences(config(seq_len=8), pairs, tokenizer, tmp_path, silent)


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.integers(1, 10))
def test_pairs_of_one_question_stay_together(questions, most):
    held = heldout_pairs(questions, most)
    sides = {question: {h for q, h in zip(questions, held, strict=True) if q == question} for question in questions}
    assert all(len(side) == 1 for side in sides.values())
    if len(sides) >= 2:
        assert any(held) and not all(held)
        first = min(questions.count(question) for question, [side] in sides.items() if side)
        assert sum(held) <= max(most, len(questions) // 5, first, max(map(questions.count, questions)))
    assert heldout_pairs(questions[::-1], most) == held[::-1]


def test_the_builtin_pairs_are_of_questions_of_their_own(pairs):
    sets = gather_questions(config())
    asked = {pair.question for pair in pairs}
    assert len(asked) == len(pairs) == 130
    assert not asked & {q.prompt for q in sets.heldout + sets.train} and not asked & {
        c.question for c in sets.conversations
    }
    assert gather_preferences(config(), sets).pairs == pairs


def test_working_is_chosen_where_there_is_something_to_work_out():
    questions = draw_unique(PREFERENCE_MIX, 0, "test", 600)
    assert sum(map(needs_working, questions)) / len(questions) == pytest.approx(0.5, abs=0.06)
    wrong = 0
    for question in questions:
        chosen, rejected = preference_answers(question, 0)
        if needs_working(question):
            assert chosen == question.completion and rejected.startswith("<think>At a glance.</think>")
            wrong += rejected != question.at_a_glance
        else:
            assert (chosen, rejected) == (question.at_a_glance, question.completion)
    assert wrong / sum(map(needs_working, questions)) == pytest.approx(SLIP_SHARE, abs=0.08)


@pytest.mark.parametrize(
    ("category", "difficulty", "expected"),
    [("addition", 1, True), ("expression", 1, True), ("word_problem", 2, True), ("word_problem", 1, False),
     ("comparison", 1, False), ("equation", 1, False)],
)  # fmt: skip
def test_one_calculation_is_done_at_a_glance(category, difficulty, expected):
    assert needs_working(make_question(category, difficulty, Random(0))) is expected


@given(st.text("0123456789, -ab", max_size=12).filter(lambda text: any(map(str.isdigit, text))), st.integers())
def test_a_slip_changes_one_digit_alone(answer, seed):
    wrong = slip(answer, Random(seed))
    [(old, new)] = [(a, b) for a, b in zip(answer, wrong, strict=True) if a != b]
    assert old.isdigit() and new.isdigit()


def write_pairs(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_a_file_is_read_without_ties_repeats_and_evaluation_questions(tmp_path):
    questions = [{"question": f"How much is {i} and {i}?", "answer": str(2 * i)} for i in range(10)]
    prompts = write_pairs(tmp_path / "q.jsonl", questions)
    sets = gather_questions(config(prompts=prompts))
    held = sets.heldout[0].prompt
    records = [{"prompt": p, "chosen": "good", "rejected": "bad"} for p in ("one", "two", "two", f"Say: {held} Now!")]
    records.append({"prompt": "three", "chosen": "same", "rejected": "same"})
    given = config(prompts=prompts, preferences=write_pairs(tmp_path / "p.jsonl", records))
    found = gather_preferences(given, sets)
    assert [pair.question for pair in found.pairs] == ["one", "two"]
    assert found.counts() == {"preference_duplicates": 1, "preference_ties": 1, "preferences_contaminated": 1}
    few = config(prompts=prompts, preferences=write_pairs(tmp_path / "few.jsonl", records[:1]))
    with pytest.raises(UserError, match=r"data\.preferences=.*1 pairs are left .*at least 2 are needed"):
        gather_preferences(few, sets)

"""Questions for evaluation, for GRPO and for SFT never meet."""

from __future__ import annotations

import json

import pytest

from ray_pipeline.data.sets.question_sets import gather_questions, same_question
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig, PipelineFields


def config(seed=0, **data):
    small = {"builtin_prompts": 300, "heldout_questions": 60, "builtin_conversations": 400}
    return PipelineFields(seed=seed, data=DataConfig(**(small | {k: str(v) for k, v in data.items()})))


def questions_of(sets):
    heldout = {same_question(q.prompt) for q in sets.heldout}
    train = {same_question(q.prompt) for q in sets.train}
    sft = {same_question(c.question) for c in sets.conversations}
    return heldout, train, sft


def write(path, count, start=0):
    numbers = range(start, count)
    lines = [{"question": f"How much is {i} and {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in numbers]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_builtin_sets_are_disjoint_and_of_the_size_asked_for():
    sets = gather_questions(config())
    heldout, train, sft = questions_of(sets)
    assert (len(heldout), len(train), len(sft)) == (60, 300, 400)
    assert not heldout & train and not heldout & sft and not train & sft


def test_builtin_sets_depend_on_the_seed_alone():
    assert gather_questions(config()).heldout == gather_questions(config()).heldout
    assert gather_questions(config()).heldout != gather_questions(config(seed=1)).heldout


def test_one_file_can_serve_both_sides(tmp_path):
    path = write(tmp_path / "q.jsonl", 400)
    sets = gather_questions(config(sft=path, prompts=path))
    heldout, train, sft = questions_of(sets)
    assert len(heldout) == 60
    assert not heldout & train and not heldout & sft and not train & sft
    assert len(train) + len(sft) == 340
    assert min(len(train), len(sft)) > 100
    assert sets.contaminated == 60


def test_the_same_questions_are_held_out_however_the_file_is_ordered(tmp_path):
    path = write(tmp_path / "q.jsonl", 200)
    backwards = tmp_path / "b.jsonl"
    backwards.write_text("\n".join(reversed(path.read_text().splitlines())))
    one, two = (gather_questions(config(prompts=p)) for p in (path, backwards))
    assert [q.prompt for q in one.heldout] == [q.prompt for q in two.heldout]


def test_a_small_file_keeps_most_questions_for_training(tmp_path):
    sets = gather_questions(config(prompts=write(tmp_path / "q.jsonl", 10)))
    assert (len(sets.heldout), len(sets.train)) == (2, 8)


def test_repeated_questions_are_counted_once(tmp_path):
    path = write(tmp_path / "q.jsonl", 10)
    louder = path.read_text().replace("How much", "HOW  MUCH")
    path.write_text(path.read_text() + "\n" + louder)
    sets = gather_questions(config(prompts=path))
    assert (len(sets.heldout) + len(sets.train), sets.duplicates) == (10, 10)


def test_conversations_that_hold_an_evaluation_question_are_dropped(tmp_path):
    prompts = write(tmp_path / "q.jsonl", 10)
    held = gather_questions(config(prompts=prompts)).heldout[0].prompt
    sft = tmp_path / "sft.jsonl"
    lines = [{"prompt": p, "response": "fine"} for p in ("Hello there", "Good day", f"Tell me: {held} Quick!")]
    sft.write_text("\n".join(map(json.dumps, lines)))
    sets = gather_questions(config(prompts=prompts, sft=sft))
    assert [c.question for c in sets.conversations] == ["Hello there", "Good day"]
    assert sets.contaminated == 1


def test_too_few_questions_or_conversations_are_refused(tmp_path):
    one = write(tmp_path / "one.jsonl", 1)
    with pytest.raises(UserError, match="--prompt-data .*1 different questions, but at least 2"):
        gather_questions(config(prompts=one))
    with pytest.raises(UserError, match="--sft-data .*1 conversations are left"):
        gather_questions(config(sft=one))


def test_the_same_words_with_other_tools_or_other_turns_trained_are_no_duplicates(tmp_path):
    turns = [{"role": "user", "content": "Add two and three."}, {"role": "assistant", "content": "Two more is five."}]
    turns += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    untrained = [*turns[:1], turns[1] | {"weight": 0}, *turns[2:]]
    records = [{"messages": turns}, {"messages": turns, "tools": [{"name": "add"}]}, {"messages": untrained}]
    sft = tmp_path / "sft.jsonl"
    sft.write_text("\n".join(map(json.dumps, [*records, records[1]])))
    sets = gather_questions(config(sft=sft))
    assert (len(sets.conversations), sets.duplicates) == (3, 1)

"""Questions of reasoning-gym: drawn from a seed, with all that their scoring needs."""

from __future__ import annotations

import itertools
import json
import sys

import pytest

from ray_pipeline.data.sets.question_sets import gather_questions
from ray_pipeline.data.sources.source_checks import check_sources
from ray_pipeline.data.sources.sources import licence_of, parse_source
from ray_pipeline.data.tasks.reasoning_gym_source import gym_questions, parse_gym_name
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig, PipelineFields

reasoning_gym = pytest.importorskip("reasoning_gym")


def config(prompts, seed=0, **data):
    small = {"builtin_prompts": 30, "heldout_questions": 10, "builtin_conversations": 5}
    return PipelineFields(seed=seed, data=DataConfig(prompts=prompts, **(small | data)))


@pytest.mark.parametrize("task", ["countdown", "chain_sum", "gcd", "word_sorting", "knights_knaves"])
def test_an_answer_scores_full_by_the_tasks_own_rule_after_json(task):
    scorer = reasoning_gym.get_score_answer_fn(task)
    for question in itertools.islice(gym_questions(task, 5, 1), 5):
        entry = json.loads(question.answer)
        assert entry["question"].strip() == question.prompt and question.category == task
        assert scorer(entry["answer"], entry) == pytest.approx(1.0)
        assert scorer("no answer", entry) < 0.5


def test_questions_are_a_function_of_the_seed_and_none_is_in_two_places():
    one, again, other = (gather_questions(config("reasoning_gym:chain_sum", seed)) for seed in (0, 0, 1))
    assert one.heldout == again.heldout and one.train == again.train
    assert {q.prompt for q in one.heldout} != {q.prompt for q in other.heldout}
    assert not {q.prompt for q in one.heldout} & {q.prompt for q in one.train}
    assert len(one.heldout) + len(one.train) + one.duplicates == 40


def test_a_size_may_be_given():
    sets = gather_questions(config("reasoning_gym:chain_sum:20"))
    assert len(sets.heldout) == (20 - sets.duplicates) // 5
    assert len(sets.train) == 20 - sets.duplicates - len(sets.heldout)
    assert parse_gym_name("reasoning_gym:chain_sum:20") == ("chain_sum", 20)
    assert parse_gym_name("reasoning_gym/chain_sum") is None
    assert licence_of("reasoning_gym:chain_sum:20") == "Apache-2.0 (reasoning-gym)"
    assert parse_source("reasoning_gym:chain_sum").kind == "gym"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("reasoning_gym:countdwn", r'^--prompt-data "reasoning_gym:countdwn": .*\(did you mean "countdown"\?\)'),
        ("reasoning_gym:", 'reasoning-gym has no task "".*It has ab, '),
        ("reasoning_gym:countdown:many", 'the size must be a number of questions, at least 2, not "many"'),
        ("reasoning_gym:composite", r"cannot be drawn as it is \(Must specify"),
        ("reasoning_gym:countdown:1", 'at least 2, not "1"'),
    ],
)
def test_a_wrong_name_is_refused_before_anything_starts(given, message):
    with pytest.raises(UserError, match=message):
        check_sources(config(given))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(UserError, match="reasoning-gym is not installed. Use pip install reasoning-gym"):
        check_sources(config("reasoning_gym:countdown"))


def test_reasoning_gym_makes_no_conversations():
    with pytest.raises(UserError, match="^--sft-data .*for --prompt-data alone"):
        check_sources(config("builtin", sft="reasoning_gym:countdown"))

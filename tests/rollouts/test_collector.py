"""Groups are asked, marked, and asked anew where all answers score alike."""

from __future__ import annotations

import io
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.generate.decode import Completion, ToolUse
from ray_pipeline.rewards.scoring import Scores
from ray_pipeline.rollouts.collector import Collected, Collector, PromptOrder, Question, is_informative
from ray_pipeline.rollouts.rollout import request_seed
from ray_pipeline.settings.schema import GrpoConfig
from ray_pipeline.settings.section import MOST_SEED

QUESTIONS = [Question(str(i), str(i % 3), [1, 2 + i]) for i in range(10)]


class Echo:
    """An engine that answers a prompt with its last token and a bit of the seed; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def submit(self, requests):
        self.asked += requests
        return requests

    def collect(self, handle):
        return [Completion(r.prompt, [r.prompt[-1], r.seed % 2 + 40, 1], [-0.5] * 3, r.seed % 3 > 0) for r in handle]


class Words:
    """Tokens as words; 1 ends."""

    eos_id = 1

    def decode(self, ids: list[int], /) -> str:
        return " ".join(map(str, ids))


def score_with(mark, failing=lambda text: False):
    """Rewards by `mark` of the question; where `failing`, none."""

    def score(items) -> Scores:
        rewards = [math.nan if failing(text) else mark(question, text) for question, text, _ in items]
        failed = [math.isnan(r) for r in rewards]
        return Scores(rewards, [{"mark": r} for r in rewards], failed, {"mark": sum(failed)} if any(failed) else {})

    return score


def collector(score, **settings) -> tuple[Collector, Echo]:
    engine = Echo()
    values = {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 8} | settings
    return Collector(GrpoConfig(**values), 5, QUESTIONS, engine, score, Words()), engine  # type: ignore[arg-type]


def last_word(question: str, text: str) -> float:
    return float(text.split()[1])


def test_groups_are_of_one_question_and_every_answer_has_its_seed():
    made, engine = collector(score_with(last_word))
    collected = made.collect(made.ask(2, 4))
    chosen = made.order.at(4, 3)
    assert [[r.completion.prompt for r in group] for group in collected.groups] == [
        [QUESTIONS[i].prompt] * 4 for i in chosen
    ]
    assert [r.seed for r in engine.asked] == [request_seed(5, 2, n, s) for n in range(3) for s in range(4)]
    assert collected.place == 7 and collected.drawn == 3


def test_groups_that_score_alike_give_way_to_those_of_the_next_prompts():
    order = PromptOrder(len(QUESTIONS), 5).at(0, len(QUESTIONS))
    dull = {QUESTIONS[order[place]].text for place in (1, 3)}
    score = score_with(lambda question, text: 0.0 if question in dull else last_word(question, text))
    plain, _ = collector(score)
    before = plain.collect(plain.ask(0, 0))
    assert [is_informative(group) for group in before.groups] == [True, False, True]
    assert (before.alike, before.place) == (1, 3)

    resampling, engine = collector(score, resample_rounds=10)
    after = resampling.collect(resampling.ask(0, 0))
    assert [group[0].question for group in after.groups] == [0, 2, 4], "the place of 1 went to 3, that of 3 to 4"
    assert [group[0].completion.prompt for group in after.groups] == [QUESTIONS[order[n]].prompt for n in (0, 2, 4)]
    assert (after.alike, after.place, after.drawn) == (2, 5, 5)
    assert len({r.seed for r in engine.asked}) == len(engine.asked) == 20, "no draw is used twice"


def test_draws_end_after_the_rounds_that_are_allowed():
    made, _ = collector(score_with(lambda *_: 1.0), resample_rounds=2)
    collected = made.collect(made.ask(0, 0))
    assert (collected.drawn, collected.alike, collected.place) == (9, 9, 9)
    assert len(collected.groups) == 3 and not any(map(is_informative, collected.groups))


def test_a_failed_reward_says_nothing_about_its_group():
    made, _ = collector(score_with(lambda *_: 1.0, failing=lambda text: text.split()[1] == "41"))
    collected = made.collect(made.ask(0, 0))
    rollouts = [r for group in collected.groups for r in group]
    assert 0 < sum(r.failed for r in rollouts) == collected.failures["mark"] < len(rollouts)
    assert not any(map(is_informative, collected.groups)), "the others all scored 1"


def test_answers_in_the_buffer_before_the_limit_lose_reward():
    made, _ = collector(score_with(lambda *_: 1.0), max_new_tokens=4, overlong_buffer=2, overlong_penalty=0.5)
    rewards = {r.reward for group in made.collect(made.ask(0, 0)).groups for r in group}
    assert rewards == {0.75}, "three tokens are one of two into the buffer"


@given(st.integers(0, 3), st.integers(0, 20))
def test_collected_rollouts_survive_a_file(iteration, place):
    made, _ = collector(score_with(last_word, failing=lambda text: text.startswith("4 ")))
    collected = made.collect(made.ask(iteration, place))
    collected.groups[0][0].completion.routing = torch.arange(6, dtype=torch.int16).view(3, 2)
    collected.groups[0][1].completion.tools = ToolUse(3, 2, 1)
    file = io.BytesIO()
    torch.save(collected.plain(), file)
    file.seek(0)
    back = Collected.of(torch.load(file, weights_only=True))
    assert repr(back) == repr(collected)  # NaN is not equal to itself
    assert torch.equal(back.groups[0][0].completion.routing, collected.groups[0][0].completion.routing)


def test_thinking_that_the_prompt_opened_is_part_of_what_is_marked():
    class Thinking(Words):
        def decode(self, ids: list[int], /) -> str:
            return "<think>\n" if ids[-1] == 2 else super().decode(ids)

    heard = []
    mark, _ = collector(score_with(lambda question, text: float(heard.append(text) or 0)), prompts_per_step=10)
    mark.tokenizer = Thinking()
    mark.collect(mark.ask(0, 0))
    opened = [text.startswith("<think>") for text in heard]
    assert any(opened) and not all(opened), "only question 0 has such a prompt"
    assert all(text.startswith("<think>2 ") or text == "<think>" for text, o in zip(heard, opened, strict=True) if o)


@given(st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_every_question_is_asked_once_an_epoch_however_many_are_asked_at_a_time(questions, seed, counts):
    order, asked, place = PromptOrder(questions, seed), [], 0
    for count in counts:
        asked += order.at(place, count)
        place += count
    for start in range(0, len(asked) - questions + 1, questions):
        assert Counter(asked[start : start + questions]) == Counter(range(questions))


@given(st.integers(2, 40), st.integers(0, 99), st.integers(1, 50))
def test_a_place_does_not_depend_on_what_was_asked_before(questions, place, count):
    used = PromptOrder(questions, 3)
    for earlier in range(0, place, 7):
        used.at(earlier, 3)
    assert PromptOrder(questions, 3).at(place, count) == used.at(place, count)


def test_seeds_and_epochs_differ():
    order = PromptOrder(50, 0)
    assert order.at(0, 50) != order.at(50, 50) and order.at(0, 50) != PromptOrder(50, 1).at(0, 50)


@pytest.mark.parametrize("seed", [2 * 10**13, MOST_SEED - 1, MOST_SEED])
def test_large_seeds_ask_every_question_once_an_epoch_too(seed):
    order = PromptOrder(7, seed)
    asked = order.at(0, 21)
    assert all(Counter(asked[start : start + 7]) == Counter(range(7)) for start in (0, 7, 14))
    assert asked != PromptOrder(7, seed - 2).at(0, 21)


def test_nothing_to_ask_is_refused():
    with pytest.raises(ValueError, match="0 questions"):
        PromptOrder(0, 0)

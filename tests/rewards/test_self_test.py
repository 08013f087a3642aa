"""A setup in which right answers do not score is refused before training: with the reward, question and score."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from ray_pipeline.data.chat.chat_templates import DEEPSEEK_TEMPLATE, DEEPSEEK_TOOLS_TEMPLATE
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.tasks.mixes import PROMPT_MIX, draw_unique
from ray_pipeline.errors import UserError
from ray_pipeline.rewards.self_test import SAMPLE, as_sampled, check_rewards
from ray_pipeline.tools.format import render_calls

SPECIAL = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
BUILTIN = [question.record() for question in draw_unique(PROMPT_MIX, 0, "prompts", 100)]
GSM8K = [
    {"prompt": "Natalia sold 48 clips in April and half as many in May. How many in all?",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = <<48+24=72>>72 in all.\n#### 72"},
    {"prompt": "Weng earns $12 an hour. What does she earn in 50 minutes?",
     "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n0.2 x 50 = $<<0.2*50=10>>10.\n#### 10"},
    {"prompt": "1000 and 234?", "answer": "1000+234=1234\n#### 1,234"},
]  # fmt: skip
CODE = [
    {"prompt": f"Write times{n}.", "answer": f"assert times{n}(3) == {3 * n}",
     "completion": f"```python\ndef times{n}(x):\n    return {n} * x\n```"}
    for n in (2, 3)
]  # fmt: skip


def tokenizer(template=DEEPSEEK_TEMPLATE) -> ChatTokenizer:
    """Bytes, and the special tokens."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevel()
    made.add_special_tokens([*SPECIAL.values(), "<｜User｜>", "<｜Assistant｜>"])
    return ChatTokenizer(made, template, SPECIAL)


def test_the_built_in_questions_pass_and_a_sample_of_them_is_enough():
    weights = {"answer": 1.0, "format": 0.1, "exact": 0.5, "length": 0.1, "repetition": 0.1, "tool_calls": 0.1}
    tried = check_rewards(weights, BUILTIN, tokenizer())
    assert tried == {name: SAMPLE for name in weights if name != "tool_calls"} | {"tool_calls": 0}


def test_worked_solutions_pass():
    assert check_rewards({"answer": 1.0, "format": 0.1}, GSM8K, tokenizer()) == {"answer": 3, "format": 3}


def test_mathematics_and_programs_pass():
    pytest.importorskip("math_verify")
    assert check_rewards({"math": 1.0}, GSM8K, tokenizer()) == {"math": 3}
    assert check_rewards({"code": 1.0, "format": 0.1}, CODE, tokenizer()) == {"code": 2, "format": 2}
    # Tests do not tell the program that passes them.
    assert check_rewards({"code": 1.0}, [{k: q[k] for k in ("prompt", "answer")} for q in CODE], tokenizer()) == {
        "code": 0
    }


def test_reasoning_gym_and_tool_calls_pass():
    pytest.importorskip("reasoning_gym")
    from ray_pipeline.data.tasks.reasoning_gym_source import gym_questions

    questions = [question.record() for question in gym_questions("countdown", 3, 0)]
    assert check_rewards({"reasoning_gym:countdown": 1.0}, questions, tokenizer()) == {"reasoning_gym:countdown": 3}
    calls = [
        {"prompt": f"{n} + 1?", "answer": json.dumps({"name": "add", "arguments": {"a": n, "b": 1}})} for n in (1, 2)
    ]
    assert check_rewards({"tool_calls": 1.0}, calls, tokenizer(DEEPSEEK_TOOLS_TEMPLATE)) == {"tool_calls": 2}


def test_an_answer_comes_back_as_it_was_written():
    question = {"prompt": "6*7?", "answer": "42"}
    for text in ("<think>6*7=42</think>42", "x", "<think>é\n\n</think> 42 "):
        assert as_sampled(question, text, tokenizer()) == text
    call = render_calls([("f", {"a": 1})])
    assert as_sampled(question, call, tokenizer()) == call


def test_a_template_that_drops_the_thinking_is_found():
    dropping = DEEPSEEK_TEMPLATE.replace(
        "+ message['content'] + eos_token", "+ message['content'].split('</think>')[-1] + eos_token"
    )
    with pytest.raises(UserError, match="drops <think>"):
        check_rewards({"format": 1.0}, BUILTIN, tokenizer(dropping))


class Careless(ChatTokenizer):
    """Does not give its text back."""

    def decode(self, ids, *, keep_special=False):
        return super().decode(ids, keep_special=keep_special).replace("think>", "thought>")


def test_a_tokenizer_that_does_not_give_text_back_is_found():
    careless = tokenizer()
    careless.__class__ = Careless
    with pytest.raises(UserError, match=r'self-test of the reward "format": .* scored 0 and not 1'):
        check_rewards({"format": 1.0}, BUILTIN, careless)


def test_references_that_the_reward_cannot_read_are_found():
    unreadable = [{"prompt": "What is left?", "answer": "nothing #### "}]
    said = "to the question 'What is left\\?' the right answer .* scored 0 and not 1; the reference is 'nothing #### '"
    with pytest.raises(UserError, match=f'self-test of the reward "exact": {said}'):
        check_rewards({"exact": 1.0}, unreadable, tokenizer())
    lines = [{"prompt": f"{n}?", "answer": f"about {n} and {n + 1}\nsecond line"} for n in range(4)]
    assert check_rewards({"exact": 1.0}, lines, tokenizer()) == {"exact": 4}


def test_a_reward_that_takes_wrong_answers_is_found():
    from tests.rewards import made  # registers it

    assert made.forgiving
    with pytest.raises(UserError, match=r'reward "forgiving": .* the wrong answer .* scored 1 and not 0'):
        check_rewards({"forgiving": 1.0}, BUILTIN, tokenizer())
    with pytest.raises(UserError, match=r"made:prefers_wrong\": right answers score less \(0\) than wrong ones \(1\)"):
        check_rewards({"tests.rewards.made:prefers_wrong": 1.0}, BUILTIN, tokenizer())
    check_rewards({"tests.rewards.made:prefers_wrong": -1.0}, BUILTIN, tokenizer())


def test_a_reward_of_the_form_alone_is_no_mistake():
    assert check_rewards({"tests.rewards.made:brevity": 1.0}, BUILTIN, tokenizer()) == {
        "tests.rewards.made:brevity": SAMPLE
    }


def test_a_reward_that_fails_is_found():
    with pytest.raises(UserError, match='"tests.rewards.made:sometimes" failed for 1 of 2 completions.*asked to raise'):
        questions = [{"prompt": "a", "answer": "raise"}, {"prompt": "b", "answer": "fine"}]
        check_rewards({"tests.rewards.made:sometimes": 1.0}, questions, tokenizer())


def test_questions_with_one_answer_have_no_wrong_ones():
    same = [{"prompt": str(n), "answer": answer} for n, answer in enumerate(["yes", "Yes", "yes "])]
    assert check_rewards({"answer": 1.0}, same, tokenizer()) == {"answer": 1}
    halves = [{"prompt": str(n), "answer": answer} for n, answer in enumerate(["1/2", "0.5", "\\frac{1}{2}"])]
    assert check_rewards({"answer": 1.0}, halves, tokenizer()) == {"answer": 1}

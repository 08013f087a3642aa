"""The built-in calculator task: exact, shortly spelled, and the same questions with and without the tool."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.chat.tokenizer_files import EOS, save_trained, train_bpe
from ray_pipeline.data.forms.question_records import ARGUMENT, CALCULATOR, tool_conversation
from ray_pipeline.data.sets.question_sets import gather_questions
from ray_pipeline.data.sources.source_checks import check_sources
from ray_pipeline.data.tasks.mixes import CATEGORIES, DIFFICULTIES, TOOLS_MIX, Mix, draw_unique, question_at
from ray_pipeline.data.tasks.tool_tasks import TOOL_REGISTRY
from ray_pipeline.data.text.builtin_text import document_at
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig, PipelineFields, TokenizerConfig
from ray_pipeline.tools.calculator import Calculator
from ray_pipeline.tools.format import CALLS_BEGIN

EVEN = Mix(TOOLS_MIX.categories, (1.0, 1.0, 1.0, 1.0, 1.0))
SMALL = {"builtin_prompts": 40, "heldout_questions": 10, "builtin_conversations": 60}


def config(tools=True, **data):
    return PipelineFields(data=DataConfig(**(SMALL | data)), tokenizer=TokenizerConfig(tools=tools))


@given(st.integers(0, 10_000))
def test_the_calculator_gives_the_answer(index):
    question = question_at(EVEN, 0, "test", index)
    conversation = tool_conversation(question)
    asked, called, output, answer = conversation.messages
    [call] = called["tool_calls"]
    assert call["function"]["name"] == CALCULATOR == Calculator.name
    assert set(call["function"]["arguments"]) == {ARGUMENT} == set(Calculator.parameters["required"])
    assert output["content"] == Calculator().call(call["function"]["arguments"]) == question.answer
    assert asked["content"] == question.prompt and int(question.answer) >= 0
    assert answer["content"].endswith(f"</think>{question.answer}")


def test_questions_are_too_long_for_the_head_and_cover_every_kind_and_level():
    questions = draw_unique(EVEN, 0, "test", 300)
    assert {(q.category, q.difficulty) for q in questions} == {(c, d) for c in TOOL_REGISTRY for d in DIFFICULTIES}
    assert not set(TOOL_REGISTRY) & set(CATEGORIES)
    assert all(sum(map(str.isdigit, question.prompt)) >= 5 for question in questions)


def test_both_models_are_asked_the_same_and_shown_other_questions():
    with_tools = gather_questions(config(sft="builtin_tools", prompts="builtin_tools"))
    without = gather_questions(config(sft="builtin_no_tools", prompts="builtin_tools"))
    assert (with_tools.heldout, with_tools.train) == (without.heldout, without.train)
    assert [c.question for c in with_tools.conversations] == [c.question for c in without.conversations]
    asked = {q.prompt for q in with_tools.heldout + with_tools.train}
    assert not asked & {c.question for c in with_tools.conversations}
    assert all(c.calls_tools for c in with_tools.conversations)
    assert not any(c.calls_tools for c in without.conversations)
    assert all("<think>At a glance.</think>" in c.messages[-1]["content"] for c in without.conversations)


def test_a_conversation_is_short_with_a_vocabulary_of_512(tmp_path):
    sets = gather_questions(config(sft="builtin_tools", prompts="builtin_tools", builtin_conversations=400))
    texts = [document_at(0, i) for i in range(300)] + [t for c in sets.conversations for t in c.spelled()]
    tokenizer = save_trained(train_bpe(texts, 512, tools=True), tmp_path)
    lengths = [len(tokenizer.encode_chat(c.messages)[0]) for c in sets.conversations]
    assert sum(lengths) / len(lengths) < 100 and max(lengths) < 150
    assert len(tokenizer.encode(CALLS_BEGIN)) == 1
    ids, mask = tokenizer.encode_chat(sets.conversations[0].messages)
    trained = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], keep_special=True)
    call, answer, rest = trained.split(EOS)
    assert call.startswith(CALLS_BEGIN) and rest == "" and "<think>" in answer
    arguments = sets.conversations[0].messages[1]["tool_calls"][0]["function"]["arguments"]
    assert json.dumps(arguments) in call


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(tools=False, sft="builtin_tools"), r"the chat template .*--set tokenizer\.tools=true"),
        (config(prompts="builtin_no_tools"), '^--prompt-data "builtin_no_tools": .*did you mean "builtin_tools"'),
        (
            config(preferences="builtin_tools").model_copy(update={"stages": ["data_prep", "dpo"]}),
            r'^data\.preferences "builtin_tools": no such file \(did you mean "builtin"\?\)',
        ),
        (PipelineFields(tokenizer=TokenizerConfig(name="x/y", tools=True)), r"^tokenizer\.tools=true with .*its own"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(given, message):
    with pytest.raises(UserError, match=message):
        check_sources(given)


def test_the_tools_task_passes_the_checks():
    check_sources(config(sft="builtin_tools", prompts="builtin_tools"))
    check_sources(config(tools=False, sft="builtin_no_tools", prompts="builtin_tools"))

"""Rewards and tools on real data sets: right references score, those of other questions do not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ray_pipeline.data.forms.chat_records import as_conversation
from ray_pipeline.data.forms.question_records import as_question
from ray_pipeline.data.tasks.question import think
from ray_pipeline.rewards.answer import answer, parse_number
from ray_pipeline.rewards.exact import exact
from ray_pipeline.rewards.think_format import think_format
from ray_pipeline.rewards.tool_use import expected_calls, tool_calls
from ray_pipeline.tools.format import render_calls
from ray_pipeline.tools.tool import describe, described_tools
from ray_pipeline.tools.tool_schema import argument_error

SHARED = Path(os.environ.get("RAY_PIPELINE_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_gsm8k = pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="the shared data is not here")
needs_tools = pytest.mark.skipif(not (SHARED / "tools").is_dir(), reason="the shared data is not here")


@needs_gsm8k
def test_all_of_gsm8ks_references_score_and_those_of_the_next_question_do_not():
    records = [json.loads(line) for line in (SHARED / "gsm8k" / "test.jsonl").read_text().splitlines()]
    questions = [as_question(record, "gsm8k") for record in records]
    for i, (question, record) in enumerate(zip(questions, records, strict=True)):
        completion = think(question.steps, question.answer)
        other = questions[i - 1].answer
        for reference in (question.answer, record["answer"]):
            assert answer(question.prompt, completion, reference) == 1.0, completion
            assert exact(question.prompt, completion, reference) == 1.0
            same = parse_number(question.answer) == parse_number(other)
            assert answer(question.prompt, think("", other), reference) == float(same), (other, reference)
        assert think_format("", completion, "") == 1.0


@needs_tools
def test_the_calls_of_real_conversations_are_parsed_matched_and_fit_their_tools():
    (path,) = (SHARED / "tools").glob("*.json")
    made = fitting = 0
    for record in json.loads(path.read_text()):
        conversation = as_conversation(record)
        schemas = described_tools(describe(conversation.tools))
        assert schemas.keys() == {tool["function"]["name"] for tool in conversation.tools}
        for message in conversation.messages:
            calls = [call["function"] for call in message.get("tool_calls", ())]
            if not calls:
                continue
            reference = json.dumps(calls)
            written = render_calls([(call["name"], call["arguments"]) for call in calls])
            assert tool_calls("", written, reference) == 1.0
            assert tool_calls("", written.replace(calls[0]["name"], "another"), reference) < 1.0
            assert len(expected_calls(reference) or ()) == len(calls)
            made += len(calls)
            fits = [argument_error(schemas[call["name"]], call["arguments"]) is None for call in calls]
            fitting += sum(fits)
            assert tool_calls(describe(conversation.tools), written, "") == pytest.approx(sum(fits) / len(fits))
    assert made == 211 and fitting >= 0.95 * made

"""Calls of tools through OpenAI's client, streamed and whole, by every engine."""

from __future__ import annotations

import json

import openai
import pytest

from tests.serving.made_servers import ADD, ADD_QUESTION, save_caller, serving, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield save_caller(tmp_path_factory.mktemp("served") / "hf")


@pytest.mark.parametrize("engine", ["native", "llamacpp"])
def test_a_call_is_read_from_the_text_and_its_result_is_taken(folder, engine):
    if engine == "llamacpp":
        pytest.importorskip("xllamacpp")
    with serving(start(folder, engine)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked = {"model": "hf", "messages": ADD_QUESTION, "tools": [ADD], "temperature": 0, "max_tokens": 80}
        choice = client.chat.completions.create(**asked).choices[0]
        [call] = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 4, "b": 3})

        name, arguments, finish = "", "", None
        for chunk in client.chat.completions.create(stream=True, **asked):
            for one in chunk.choices:
                finish = one.finish_reason or finish
                for piece in one.delta.tool_calls or ():
                    name += piece.function.name or ""
                    arguments += piece.function.arguments or ""
        assert (finish, name, json.loads(arguments)) == ("tool_calls", "add", {"a": 4, "b": 3})

        asked["messages"] = [
            *ADD_QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "7"},
        ]
        assert client.chat.completions.create(**asked).choices[0].finish_reason in ("stop", "length", "tool_calls")

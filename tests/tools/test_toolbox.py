"""Calls are carried out and counted; whatever goes wrong is told to the model and never raised."""

from __future__ import annotations

import json
import time

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.settings.post_training import ToolsConfig
from ray_pipeline.tools.calls import BadCall, ToolCall
from ray_pipeline.tools.known_tools import check_tool_names, get_tool
from ray_pipeline.tools.toolbox import MAX_OUTPUT_CHARACTERS, ToolBox

MADE = [f"tests.tools.made:{name}" for name in ("add", "greet", "hang", "raises", "dies", "talks")]


@pytest.fixture(scope="module")
def box():
    with ToolBox(ToolsConfig(names=["calculator", "python", *MADE], timeout_seconds=2)) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("calculator", {"expression": "6*7"}, "42"),
        ("calculator", {"expression": "1/0"}, "Error: division by zero"),
        ("calculator", {"expr": "1"}, "Error: wrong arguments: "),
        ("calculator", {"expression": 1}, "Error: wrong arguments: ['expression']: 1 is not of type 'string'"),
        ("python", {"code": "x = 6\nx * 7"}, "42"),
        ("python", {"code": "print('a')\n'b'"}, "a\nb"),
        ("python", {"code": "def f():\n    return 1\nfor i in range(2):\n    print(f())"}, "1\n1"),
        ("python", {"code": "1/0"}, "Error: ZeroDivisionError: division by zero"),
        ("python", {"code": "(("}, "Error: SyntaxError: "),
        ("python", {"code": "while True: pass"}, "Error: took longer than 2 seconds"),
        ("python", {"code": "import socket; socket.socket()"}, "Error: PermissionError: "),
        ("greet", {"name": "Ada"}, "Hello, Ada!"),
        ("add", {"a": 1, "b": 2}, '{"sum": 3, "unit": "m", "tags": null}'),
        ("raises", {"text": "no luck"}, "Error: ValueError: no luck (made.py, line "),
        ("hang", {"seconds": 60}, "Error: took longer than 2 seconds"),
        ("dies", {"code": 3}, "Error: its process died (exit code 3)"),
        ("greet", {"name": "Bo"}, "Hello, Bo!"),
        ("calculater", {}, "Error: there is no tool 'calculater'; there are calculator, python, add"),
    ],
)
def test_the_result_or_what_went_wrong_is_told(box, name, arguments, text):
    told = box.call(ToolCall(name, arguments))
    assert told == text or (text.startswith("Error") and told.startswith(text)), told


def test_what_cannot_be_read_is_told_and_the_other_calls_are_answered():
    with ToolBox(ToolsConfig(names=["calculator"])) as box:
        good, bad = ToolCall("calculator", {"expression": "1"}), ToolCall("calculator", {"expression": "x"})
        calls = [good, bad, good, BadCall("...", "no JSON"), ToolCall("shell", {})]
        texts = box.call_many(calls)
        assert texts[0] == texts[2] == "1" and texts[3] == "Error: the call cannot be read: no JSON"
        assert texts[1].startswith("Error: ") and texts[4].startswith("Error: there is no tool 'shell'")


def test_many_calls_keep_their_order(box):
    calls = [ToolCall("python", {"code": f"print({i})"}) for i in range(4)]
    calls += [ToolCall("greet", {"name": str(i)}) for i in range(4)]
    assert box.call_many(calls) == [*map(str, range(4)), *(f"Hello, {i}!" for i in range(4))]


def test_a_long_output_is_cut(box):
    told = box.call(ToolCall("talks", {"words": 10_000}))
    assert told.endswith("... (48000 more characters)") and len(told) < MAX_OUTPUT_CHARACTERS + 40


def test_a_users_module_is_loaded_once(box):
    box.call(ToolCall("greet", {"name": "a"}))
    started = time.monotonic()
    for _ in range(20):
        box.call(ToolCall("greet", {"name": "b"}))
    assert time.monotonic() - started < 4  # a process for each would take longer


def test_specs_are_openais_form(box):
    spec = box.specs[0]
    assert spec["type"] == "function" and spec["function"]["name"] == "calculator"
    assert json.loads(json.dumps(spec)) == spec


def test_unknown_tools_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r'tool "calculater" is not known \(did you mean "calculator"\?\)'):
        get_tool("calculater")
    with pytest.raises(UserError, match="importing no_such_module failed"):
        check_tool_names(["no_such_module:f"])
    with pytest.raises(UserError, match=r'no function "ad" \(did you mean "add"\?\)'):
        check_tool_names(["tests.tools.made:ad"])
    with pytest.raises(UserError, match="has no docstring"):
        check_tool_names(["tests.tools.made:undocumented"])
    with pytest.raises(UserError, match='"calculator" and "calculator" are both called calculator'):
        check_tool_names(["calculator", "calculator"])
    check_tool_names(["calculator", "python", *MADE])

"""What a system prompt says of tools is what the chat templates write, and can be read back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.chat.chat_templates import TOOLS_SECTION
from ray_pipeline.data.chat.template_jinja import compile_template
from ray_pipeline.settings.post_training import ToolsConfig
from ray_pipeline.tools.tool import describe, described_tools, tool_spec
from ray_pipeline.tools.toolbox import ToolBox

NAMES = st.from_regex(r"[a-z_]{1,10}", fullmatch=True)
LINES = st.text(st.characters(exclude_characters="#", exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=20)
SCHEMAS = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(NAMES, st.just({"type": "string"}), max_size=3)}
)
TOOLS = st.lists(
    st.fixed_dictionaries({"name": NAMES, "description": LINES, "parameters": SCHEMAS}),
    max_size=3,
    unique_by=lambda tool: tool["name"],
)


@given(TOOLS)
def test_a_description_is_what_the_chat_template_writes(tools):
    rendered = compile_template(TOOLS_SECTION).render(tools=[tool_spec(tool) for tool in tools])
    assert describe(tools) == (rendered if tools else "")


@given(TOOLS, st.text(max_size=10), st.text(max_size=10))
def test_names_and_schemas_are_read_back(tools, before, after):
    text = f"{before}\n\n{describe(tools)}\n{after}"
    assert described_tools(text) == {tool["name"]: tool["parameters"] for tool in tools}


def test_our_tools_and_their_specs_are_described_alike():
    box = ToolBox(ToolsConfig(names=["calculator", "python"]))
    assert describe(box.tools.values()) == describe(box.specs) == describe(s["function"] for s in box.specs)
    assert described_tools(describe(box.specs)).keys() == {"calculator", "python"}
    assert described_tools("### x\nParameters: {not JSON}") == {}

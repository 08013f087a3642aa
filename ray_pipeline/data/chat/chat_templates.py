"""The chat templates of tokenizers trained here, in Jinja. Rendering them is in `chat`."""

from __future__ import annotations

from ray_pipeline.tools.format import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    SEPARATOR,
)

# DeepSeek-V3's turns (arXiv:2412.19437). Nothing is stripped from an answer: the reasoning is what SFT trains.
DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

# A dialogue in plain words, for a model that has seen text alone, as DeepSeek-R1-Zero was (arXiv:2501.12948, table 1).
# An answer begins on a line of its own: a space before it would be half of its first token.
PLAIN = "plain"
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:\n' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

# The list of tools as DeepSeek-V3.1's model card words it.
TOOLS_SECTION = (
    "{{ '## Tools\\nYou have access to the following tools:\\n' }}"
    "{% for tool in tools %}"
    "{{ '\\n### ' + tool['function']['name'] + '\\n' }}"
    "{% if tool['function']['description'] %}{{ 'Description: ' + tool['function']['description'] + '\\n\\n' }}"
    "{% endif %}"
    "{% if tool['function']['parameters'] %}{{ 'Parameters: ' + tool['function']['parameters'] | tojson + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
)

_CALLS = (
    "{% if message['tool_calls'] %}"
    f"{{{{ '{CALLS_BEGIN}' }}}}"
    "{% for call in message['tool_calls'] %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    f"{{{{ '{CALL_BEGIN}' + call['type'] + '{SEPARATOR}' + call['function']['name'] + '\\n```json\\n' }}}}"
    "{% if call['function']['arguments'] is string %}{{ call['function']['arguments'] }}"
    "{% else %}{{ call['function']['arguments'] | tojson }}{% endif %}"
    f"{{{{ '\\n```{CALL_END}' }}}}"
    "{% endfor %}"
    f"{{{{ '{CALLS_END}' }}}}"
    "{% endif %}"
)

# The same with tools: listed in the system message, called and answered in DeepSeek-V3's own format. As there, the
# assistant goes on right after the outputs, without a turn token. Conversations without tools render as above.
DEEPSEEK_TOOLS_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}"
    "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    f"{TOOLS_SECTION}"
    "{% endif %}"
    "{% set state = namespace(outputs=false) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    f"{{{{ '\\n' if state.outputs else '{OUTPUTS_BEGIN}' }}}}"
    f"{{{{ '{OUTPUT_BEGIN}' + message['content'] + '{OUTPUT_END}' }}}}"
    "{% set state.outputs = true %}"
    "{% else %}"
    f"{{% if state.outputs %}}{{{{ '{OUTPUTS_END}' }}}}{{% endif %}}"
    "{% if message['role'] == 'system' %}{% if not (tools and loop.first) %}{{ message['content'] }}{% endif %}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% if not state.outputs %}{{ '<｜Assistant｜>' }}{% endif %}"
    f"{{{{ message['content'] or '' }}}}{_CALLS}{{{{ eos_token }}}}"
    "{% else %}{{ raise_exception('roles are system, user, assistant and tool, not ' + message['role']) }}{% endif %}"
    "{% set state.outputs = false %}"
    "{% endif %}"
    "{% endfor %}"
    f"{{% if state.outputs %}}{{{{ '{OUTPUTS_END}' }}}}"
    "{% elif add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

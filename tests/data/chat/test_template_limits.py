"""A stranger's template is rendered as jinja2 renders it, or refused before it takes long or makes much."""

from __future__ import annotations

import resource
import time

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ray_pipeline.data.chat import template_limits
from ray_pipeline.data.chat.chat import compile_template
from ray_pipeline.data.chat.chat_templates import DEEPSEEK_TOOLS_TEMPLATE
from ray_pipeline.data.chat.template_limits import BoundedEnvironment, TemplateTooLarge
from ray_pipeline.errors import UserError

MESSAGES = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4", "n": [1, {"a": None}]}]
GROWS = "{%% set ns = namespace(a=%s) %%}{%% for i in range(90) %%}{%% set ns.a = %s %%}{%% endfor %%}{{ ns.a }}"
BIG = "{% set s = 'x' * 1000000 %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ m['role'] ~ ': ' ~ m.content }}\n{% endfor %}",
        "{% macro turn(m) %}<{{ m.role|upper }}>{{ caller() }}{% endmacro %}{% call turn(messages[0]) %}x{% endcall %}",
        "{{ messages|tojson }} {{ messages|map(attribute='role')|join(', ') }} {{ (messages|length) * 'ab' }}",
        "{{ '%s=%5.2f' % ('a', 1.5) }} {{ '{:>8}|{a}'.format('x', a=3) }} {{ 'abc'[::-1] }} {{ [1, 2] + [3] }} "
        "{{ 2 ** 10 }}",
        "{% set ns = namespace(text='', seen=false) %}{% for m in messages if m.role == 'user' %}{% set ns.text "
        "= ns.text + m.content %}"
        "{% endfor %}{{ ns.text.replace('2', 'two') }}{{ {'a': messages[1]}['a']['n'] }}{{ (1, 'b') }}{{ dict(a=1) }}",
        "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k ~ v }}{% if loop.last %}.{% endif %}{% endfor %}{{ none "
        "}}{{ true }}",
        "{% filter upper %}{% for i in range(3) %}{{ i }}{% endfor %}{% endfilter %}{{ messages | "
        "selectattr('n') | list }}",
        DEEPSEEK_TOOLS_TEMPLATE,
    ],
)
def test_ordinary_templates_give_what_jinja_gives(source: str) -> None:
    options = {"trim_blocks": True, "lstrip_blocks": True}
    values = {"messages": MESSAGES, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    expected = ImmutableSandboxedEnvironment(**options).from_string(source).render(**values)
    assert BoundedEnvironment(**options).compile_bounded(source).render(**values) == expected
    assert expected.strip()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 'x' * 10**10 }}", "characters"),
        ("{{ [1] * 10**10 }}", "characters"),
        ("{{ 10 ** 10000000000 }}", "digits"),
        ("{% set x = 10 ** 900 %}{{ x * x }}", "digits"),
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "seconds"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "without end"),
        ("{{ 'a'|center(10000000000) }}", "width or count"),
        ("{{ 'x'.ljust(10000000000) }}", "width or count"),
        ("{{ [1]|slice(1000000000)|list }}", "width or count"),
        ("{{ {'a': 1}|tojson(indent=1000000000) }}", "width or count"),
        ("{{ '%1000000000d' % 1 }}", "width"),
        ("{{ '{:>1000000000}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 10**9) }}", "width"),
        (BIG + "{{ ('{0}' * 100000).format(s) }}", "characters"),
        (BIG + "{{ ([s] * 100000)|join }}", "characters"),
        (BIG + "{{ ''.join([s] * 100000) }}", "characters"),
        (BIG + "{{ s.replace('x', s) }}", "characters"),
        (BIG + "{{ s|replace('x', s) }}", "characters"),
        (BIG + "{{ s|wordwrap(1, wrapstring=s) }}", "characters"),
        ("{{ 'a'.expandtabs(9) }}", "expandtabs"),
        (GROWS % ("'x'", "ns.a ~ ns.a"), "characters"),
        (GROWS % ("'x'", "ns.a + ns.a"), "characters"),
        (GROWS % ("['x']", "[ns.a, ns.a]"), "seconds|characters"),
        (GROWS % ("{}", "dict(a=ns.a, b=ns.a)"), "seconds|characters"),
        ("{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}", "without end"),
    ],
)
def test_a_hostile_template_is_stopped(source: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "RENDER_SECONDS", 0.5)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(TemplateTooLarge, match=said):
        compile_template(source).render(messages=MESSAGES)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "KiB"


def test_the_clock_cannot_be_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "RENDER_SECONDS", 0.5)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    for shadow in ("{% macro tick() %}{% endmacro %}", "{% set tick = 1 %}", "{% set environment = 1 %}"):
        with pytest.raises(jinja2.TemplateError):
            compile_template(shadow + loop).render()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a" * (template_limits.SOURCE_CHARACTERS + 1), "characters, more than"),
        ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "nested too deep"),
        ("{% if 1 %}" * 900 + "{% endif %}" * 900, "nested too deep"),
        ("{% for a in b %}" * 60 + "{% endfor %}" * 60, "cannot be compiled"),
        ("{% if %}", "line 1"),
    ],
)
def test_a_template_that_is_none_is_refused(source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compile_template(source)

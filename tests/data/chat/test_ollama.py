"""A Modelfile says in Go's language what the Jinja template says, or that it cannot."""

from __future__ import annotations

from ray_pipeline.data.chat.chat import ChatTemplate
from ray_pipeline.data.chat.chat_templates import DEEPSEEK_TEMPLATE
from ray_pipeline.data.chat.ollama import modelfile

SPECIAL = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}


def test_our_template_in_go_with_stop_and_parameters():
    template = ChatTemplate(DEEPSEEK_TEMPLATE, SPECIAL)
    text = modelfile("model-q8_0.gguf", template, begins=True, stop=[SPECIAL["eos_token"]], parameters={"num_ctx": 128})
    assert text.splitlines() == [
        "# ollama create NAME -f model-q8_0.Modelfile",
        "FROM ./model-q8_0.gguf",
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}{{ else if eq .Role "user" }}'
        '<｜User｜>{{ .Content }}{{ else if eq .Role "assistant" }}<｜Assistant｜>{{ .Content }}'
        '<｜end▁of▁sentence｜>{{ end }}{{ end }}<｜Assistant｜>"""',
        'PARAMETER stop "<｜end▁of▁sentence｜>"',
        "PARAMETER num_ctx 128",
    ]
    without = modelfile("m.gguf", template, begins=False, stop=[], parameters={})
    assert 'TEMPLATE """<｜begin▁of▁sentence｜>{{ range' in without


def test_chatml_keeps_what_stands_between_turns():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text = modelfile("m.gguf", ChatTemplate(source, SPECIAL), begins=False, stop=[], parameters={})
    assert 'eq .Role "user" }}<|im_start|>user\n{{ .Content }}' in text and '"""' in text


def test_a_template_that_does_more_is_not_guessed():
    source = "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    text = modelfile("m.gguf", ChatTemplate(source, SPECIAL), begins=False, stop=[], parameters={})
    assert "# No TEMPLATE" in text and 'TEMPLATE """' not in text

"""Where a chat template is read from: a tokenizer's folder, one of several named ones, a file."""

from __future__ import annotations

import json
import os

import pytest
from tokenizers import Tokenizer

from ray_pipeline.data.chat.chat_templates import DEEPSEEK_TEMPLATE
from ray_pipeline.data.chat.template_files import read_template
from ray_pipeline.errors import UserError
from tests.data.chat.test_chat_layout import BPE, DATED, MARKED, REASONING, turns


def folder_with(path, templates=None, **files):
    """A tokenizer's folder with these named templates in its config, and these files."""
    from ray_pipeline.data.chat.tokenizer_files import save_trained

    save_trained(Tokenizer.from_str(BPE.to_str()), path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    if templates is not None:
        config["chat_template"] = templates
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, source in files.items():
        target = path / name.replace("__", "/").replace("_jinja", ".jinja")
        target.parent.mkdir(exist_ok=True)
        target.write_text(source)
    return path


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
FOR_TOOLS = "{{ tools | tojson }}" + DEEPSEEK_TEMPLATE
NAMED = [{"name": "default", "template": DEEPSEEK_TEMPLATE}, {"name": "tool_use", "template": FOR_TOOLS},
         {"name": "dated", "template": DATED}]  # fmt: skip


@pytest.mark.parametrize("as_files", [False, True])
def test_named_templates_are_chosen_as_transformers_does(tmp_path, as_files):
    from transformers import AutoTokenizer

    from ray_pipeline.data.chat.tokenizer_files import copy_pretrained

    if as_files:
        files = {f"additional_chat_templates__{e['name']}_jinja": e["template"] for e in NAMED[1:]}
        folder = folder_with(tmp_path / "a", chat_template_jinja=DEEPSEEK_TEMPLATE, **files)
    else:
        folder = folder_with(tmp_path / "a", NAMED)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = copy_pretrained(str(folder), tmp_path / "copy")
    messages = turns("2+2?", "4")
    for tools in ([], [TOOL]):
        expected = theirs.apply_chat_template(messages, tools=tools or None, tokenize=False)
        assert ours.template.render(messages, tools=tools) == expected
    assert ours.encode_chat(messages, [TOOL])[0] == theirs.apply_chat_template(
        messages, tools=[TOOL], return_dict=False
    )
    dated = copy_pretrained(str(folder), tmp_path / "dated", "dated")
    assert dated.template.source == DATED
    assert AutoTokenizer.from_pretrained(tmp_path / "dated").chat_template == DATED


def test_a_setting_names_another_template(tmp_path):
    from ray_pipeline.dag.identity import identities
    from ray_pipeline.data.chat.tokenizer_files import save_trained
    from ray_pipeline.data.sources.source_checks import check_sources
    from ray_pipeline.settings.schema import PipelineFields, TokenizerConfig

    file = tmp_path / "mine.jinja"
    file.write_text(REASONING)
    trained = save_trained(Tokenizer.from_str(BPE.to_str()), tmp_path / "trained", str(file))
    assert trained.template.source == REASONING
    config = PipelineFields(tokenizer=TokenizerConfig(chat_template=str(file)))
    check_sources(config)
    before = identities(config)["data_prep"].key
    assert before != identities(PipelineFields())["data_prep"].key
    file.write_text(MARKED)
    assert identities(config)["data_prep"].key != before


@pytest.mark.parametrize(
    ("templates", "given", "message"),
    [
        (NAMED, "datd", r'tokenizer\.chat_template=datd: .* has dated, default, tool_use \(did you mean "dated"\?\)'),
        (NAMED, "none.jinja", r"none\.jinja: the chat template cannot be read \(No such file"),
        (
            NAMED[1:],
            None,
            r"has the chat templates dated, tool_use, and none of them is the default.*chat_template=dated",
        ),
        ([{"name": "default"}], None, 'each of the list "chat_template" needs a "name" and a "template"'),
        (None, None, r"has no chat template.*--set tokenizer\.chat_template=FILE\.jinja"),
        (None, "dated", "has no template of its own"),
    ],
)
def test_a_template_that_is_not_there_is_named(tmp_path, templates, given, message):
    from ray_pipeline.data.chat.tokenizer import load_tokenizer

    with pytest.raises(UserError, match=message):
        load_tokenizer(folder_with(tmp_path / "a", templates), given)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    from ray_pipeline.data.chat.tokenizer import load_tokenizer

    (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bad\.jinja: the chat template cannot be read \(it is not UTF-8\)"):
        load_tokenizer(folder_with(tmp_path / "a", NAMED), str(tmp_path / "bad.jinja"))


@pytest.mark.parametrize("path", ["/dev/zero", "pipe.jinja", "large.jinja"])
def test_a_template_that_would_be_read_without_end_is_refused(tmp_path, path):
    os.mkfifo(tmp_path / "pipe.jinja")
    (tmp_path / "large.jinja").touch()
    os.truncate(tmp_path / "large.jinja", 1 << 33)  # a file with a hole: it takes no disk
    with pytest.raises(UserError, match=rf"{path}: (is no regular file|8589934592 bytes, more than)"):
        read_template(tmp_path / path)

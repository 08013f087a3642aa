"""Which part of a rendered conversation is learned, for each kind of chat template there is."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from pathlib import Path

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer

from ray_pipeline.data.chat.chat import Chat, ChatTemplate
from ray_pipeline.data.chat.chat_templates import DEEPSEEK_TEMPLATE
from ray_pipeline.data.chat.template_jinja import TODAY
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.chat.tokenizer_files import EOS, SPECIAL_STRINGS, train_bpe
from ray_pipeline.data.text.builtin_text import document_at
from ray_pipeline.errors import UserError

BPE = train_bpe([document_at(0, index) for index in range(100)], 320)
SAID = "message['content']"
# As DeepSeek-R1's: the prompt opens the thinking, and turns that are rendered have none.
REASONING = DEEPSEEK_TEMPLATE.replace(f"{SAID} + eos", f"{SAID}.split('</think>')[-1] + eos").replace(
    "prompt %}{{ '<｜Assistant｜>' }}", "prompt %}{{ '<｜Assistant｜><think>\\n' }}"
)
# As QwQ's: the prompt opens the thinking, and so does the last turn; R1's later templates keep no line end.
OPENED_BOTH = REASONING.replace(f"{SAID}.split('</think>')[-1]", SAID)
OPENED_BARE = REASONING.replace("<think>\\n", "<think>")
# The prompt asks for no thinking.
CLOSED = REASONING.replace("<think>\\n", "<think>\\n\\n</think>\\n\\n")
# As Qwen3's: earlier turns lose their thinking.
REWRITING = DEEPSEEK_TEMPLATE.replace(
    f"{SAID} + eos_token", f"({SAID} if loop.last else {SAID}.split('</think>')[-1]) + eos_token"
)
MARKED = DEEPSEEK_TEMPLATE.replace(
    "{{ '<｜Assistant｜>' + message['content'] + eos_token }}",
    "{{ '<｜Assistant｜>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}",
)
PARTS = DEEPSEEK_TEMPLATE.replace("message['content']", "message['content'][0]['text']")
DATED = DEEPSEEK_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token + strftime_now('%d %B %Y') }}")
PUBLISHED = sorted(Path(pytest.importorskip("trl").__file__).parent.glob("chat_templates/*.jinja"))


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def made(template, eos_token=EOS):
    raw = Tokenizer.from_str(BPE.to_str())
    raw.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
    return ChatTokenizer(raw, template, SPECIAL_STRINGS | {"eos_token": eos_token})


def learned(tokenizer, messages, tools=()):
    """Of each sample, (what stands before its answers, what is trained of it)."""
    out = []
    for ids, mask in tokenizer.encode_turns([Chat(messages, tools)])[0]:
        texts = [tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m == on], keep_special=True)
                 for on in (0, 1)]  # fmt: skip
        out.append(tuple(texts))
    return out


@pytest.mark.parametrize(
    ("template", "answer", "prompt", "expected"),
    [
        (REASONING, "4", "<think>\n", "\n</think>\n\n4"),
        (REASONING, "<think>\n2+2=4\n</think>\n\n4", "<think>\n", "2+2=4\n</think>\n\n4"),
        (REASONING, "<think>2+2=4</think>4", "<think>\n", "2+2=4</think>4"),
        (OPENED_BARE, "4", "<think>", "</think>4"),
        (OPENED_BARE, "<think>2+2=4</think>4", "<think>", "2+2=4</think>4"),
        (OPENED_BOTH, "<think>\n2+2=4\n</think>\n\n4", "<think>\n", "2+2=4\n</think>\n\n4"),
        (OPENED_BOTH, "<think>2+2=4</think>4", "<think>\n", "2+2=4</think>4"),
        (CLOSED, "4", "<think>\n\n</think>\n\n", "4"),
        (MARKED, "<think>2+2=4</think>4", "", "<think>2+2=4</think>4"),
        (PARTS, "<think>2+2=4</think>4", "", "<think>2+2=4</think>4"),
    ],
)
def test_an_answer_is_learned_from_where_its_prompt_ends(template, answer, prompt, expected):
    tokenizer = made(template).check()
    messages = turns("2+2?", answer)
    [(before, trained)] = learned(tokenizer, messages)
    assert trained == expected + EOS
    assert before.removesuffix("\n" * (template is MARKED)) == (
        tokenizer.decode(tokenizer.encode_prompt("2+2?"), keep_special=True)
    )
    assert before.rstrip("\n").endswith(f"2+2?<｜Assistant｜>{prompt}".rstrip("\n"))


def test_what_a_question_spells_stays_text_in_a_thought_that_is_added():
    tokenizer = made(REASONING)
    ids, mask = tokenizer.encode_chat(turns("<think>", f"<think>\n{EOS}</think>4"))
    assert ids.count(tokenizer.eos_id) == 1 and mask[-1] == 1
    assert learned(tokenizer, turns("<think>", f"<think>\n{EOS}</think>4"))[0][1] == f"{EOS}</think>4{EOS}"


@pytest.mark.parametrize("template", [REASONING, REWRITING])
def test_each_answer_is_learned_after_what_a_model_would_have_seen(template):
    tokenizer = made(template)
    messages = turns("2+2?", "<think>\na\n</think>4", "3+3?", "<think>\nb\n</think>6")
    samples = tokenizer.encode_turns([Chat(messages)])[0]
    assert len(samples) == 2
    for (ids, mask), end in zip(samples, (1, 3), strict=True):
        prompt = tokenizer.encode_prompt(messages[:end])
        assert ids[: len(prompt)] == prompt
        assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    first, second = (text for _, text in learned(tokenizer, messages))
    assert first.endswith("a\n</think>4" + EOS) and second.endswith("b\n</think>6" + EOS)
    assert "a\n</think>" not in tokenizer.decode(samples[1][0])


def test_a_stop_token_behind_the_last_answer_alone_is_learned_by_each(tmp_path):
    template = MARKED.replace(" + eos_token }}{% endg", " + (eos_token if loop.last else '') }}{% endg")
    tokenizer = made(template)
    assert [text for _, text in learned(tokenizer, turns("2+2?", "4", "3+3?", "6"))] == [f"4{EOS}", f"6{EOS}"]


def test_only_trained_answers_keep_their_marks():
    tokenizer = made(MARKED)
    messages = turns("2+2?", "4", "3+3?", "6")
    [(ids, mask)] = tokenizer.encode_chats([Chat(messages, (), 0, frozenset({1}))])
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "6"
    [(_, last)] = tokenizer.encode_chats([Chat(messages, (), 3)])
    assert last == mask
    lone = made(MARKED.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endif %}"
    ))  # fmt: skip
    with pytest.raises(UserError, match="has 1 {% generation %} blocks for 2 answers, of which 1 are trained"):
        lone.encode_chats([Chat(messages, (), 3)])


def test_the_stop_token_may_stand_behind_the_marks():
    template = MARKED.replace(" + eos_token }}{% endgeneration %}", " }}{% endgeneration %}{{ eos_token }}")
    assert learned(made(template), turns("2+2?", "4"))[0][1] == f"4{EOS}"


def test_a_prompt_without_thinking_refuses_answers_with_it():
    with pytest.raises(
        UserError, match=r"prompt ends with '<think>\\n\\n</think>\\n\\n', but an answered .* '\\n</think>|'4"
    ):
        made(CLOSED).encode_chat(turns("2+2?", "<think>a</think>4"))


def test_the_day_that_a_template_asks_for_is_always_the_same():
    rendered = ChatTemplate(DATED, SPECIAL_STRINGS).render(turns("2+2?"))
    assert TODAY.strftime("%d %B %Y") in rendered


KINDS = {
    "plain": turns("What is asked?", "That is said."),
    "system": [{"role": "system", "content": "Be brief."}, *turns("What is asked?", "That is said.")],
    "turns": turns("What is asked?", "That is said.", "And then?", "This is said."),
    "thought": turns("What is asked?", "<think>\nIt is thought.\n</think>\n\nThat is said."),
}
# What a template of TRL's that transformers renders is refused for.
REASONS = "does not end an answer with the eos token|the chat template drops|generation prompt ends with"
_TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{3,20}\]")


def test_nine_in_ten_published_templates_render_as_in_transformers_with_a_right_mask(monkeypatch):
    from transformers.utils import chat_template_utils

    class Today(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(TODAY.year, TODAY.month, TODAY.day)

    def theirs(source, messages, eos):
        special = SPECIAL_STRINGS | {"eos_token": eos}
        return chat_template_utils.render_jinja_template([messages], chat_template=source, **special)[0][0]

    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    rendered, right = Counter(), Counter()
    for path in PUBLISHED:
        source = path.read_text()
        for kind, messages in KINDS.items():
            try:
                # The stop token is the tag that the template writes behind an answer.
                behind = _TAG.search(theirs(source, messages, EOS).rpartition("is said.")[2])
                eos = behind[0] if behind else EOS
                expected = theirs(source, messages, eos)
            except (jinja2.TemplateError, TypeError, ValueError):
                continue  # a kind of conversation, or of content, that it is not for
            if "What is asked?" in expected:
                rendered[kind] += 1
                tokenizer = made(source, eos)
                assert tokenizer.template.render(messages) == expected, path.name
                right[kind] += is_right(tokenizer, messages, path.name)
    assert all(rendered[kind] > 50 and right[kind] >= 0.9 * rendered[kind] for kind in KINDS), (rendered, right)


@pytest.mark.parametrize("kind", ["plain", "system", "turns", "thought"])
def test_deepseek_r1s_own_template_renders_with_a_right_mask(kind):
    [path] = [path for path in PUBLISHED if path.stem == "deepseek_r1_distill"]
    assert is_right(made(path.read_text(), "<｜end▁of▁sentence｜>"), KINDS[kind], path.name)


def is_right(tokenizer, messages, name):
    """Whether the answers and nothing else are trained; a template may be refused, but only with the true reason."""
    try:
        said = "".join(text for _, text in learned(tokenizer, messages))
    except UserError as error:
        assert re.search(REASONS, str(error)), name
        return False
    parts = [part for part in ("That is said.", "This is said.", "It is thought.") if part in str(messages)]
    assert all(part in said for part in parts), name
    assert not any(part in said for part in ("What is", "And then", "brief")), name
    return True


@pytest.mark.parametrize("form", ["%99999999d", "%_9Y", "x" * 300])
def test_a_day_cannot_be_written_at_any_length(form):
    template = ChatTemplate(f"{{{{ strftime_now('{form}') }}}}", SPECIAL_STRINGS)
    with pytest.raises(UserError, match="formats are short, and their fields have no widths"):
        template.render(turns("2+2?"))

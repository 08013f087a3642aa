"""The light tokenizer equals transformers on the same folder."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ray_pipeline.data.chat.chat_templates import DEEPSEEK_TEMPLATE
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import BOS, EOS, SPECIAL, THINK, copy_pretrained, save_trained, train_bpe
from ray_pipeline.data.tasks.mixes import SFT_MIX, draw_unique
from ray_pipeline.data.text.builtin_text import document_at
from ray_pipeline.errors import UserError

TEXTS = [document_at(0, index) for index in range(400)]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As DeepSeek-R1's: what was thought is cut from answers.
DROPS_THINKING = DEEPSEEK_TEMPLATE.replace("message['content'] + eos", "message['content'].split('</think>')[-1] + eos")
LATER_TURNS_REWRITE = DEEPSEEK_TEMPLATE.replace(
    "message['content'] + eos_token",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1]) + eos_token",
)
anything = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
# transformers reads the name of a special token inside a text as that token, ours does not: no equality there.
plain = anything.filter(lambda text: not any(token in text for token in SPECIAL + THINK))
roles = st.lists(st.tuples(plain, plain), min_size=1, max_size=3)


def conversation(turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_trained(train_bpe(TEXTS, 512), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def hf(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chatml_folder(tmp_path_factory):
    """A pretrained tokenizer of another family: no bos, ChatML, a post-processor that trims offsets."""
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    path = tmp_path_factory.mktemp("chatml")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    wrapped.save_pretrained(path)
    return path


def test_training_gives_the_vocabulary_asked_for(tokenizer, hf):
    assert len(tokenizer) == len(hf) == 512


def test_training_twice_gives_the_same_tokenizer():
    assert train_bpe(TEXTS, 400).to_str() == train_bpe(TEXTS, 400).to_str()


def test_special_tokens_are_deepseeks_and_one_id_each(tokenizer, hf):
    assert (hf.bos_token, hf.eos_token, hf.pad_token) == (BOS, EOS, "<｜▁pad▁｜>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id)
    assert len(set(hf.convert_tokens_to_ids(["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", BOS, EOS]))) == 6


def test_each_digit_is_a_token_of_its_own(tokenizer):
    assert len(tokenizer.encode("1234567")) == 7
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12+3")] == ["1", "2", "+", "3"]


def test_documents_take_100_to_200_tokens(tokenizer):
    lengths = [len(ids) for ids in tokenizer.encode_batch(TEXTS)]
    assert 100 < sum(lengths) / len(lengths) < 200


@given(anything)
@example("<｜▁pad▁｜>")
def test_text_comes_back_byte_for_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(plain)
def test_encode_equals_transformers(tokenizer, hf, text):
    assert tokenizer.encode(text) == hf.encode(text, add_special_tokens=False)
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def test_a_document_cannot_end_itself(tokenizer):
    ids = tokenizer.encode_document(f"never {EOS} ends")
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids) == f"never {EOS} ends"


def test_decoding_keeps_think_tags_and_drops_special_tokens(tokenizer):
    ids, _ = tokenizer.encode_chat(conversation([("2+2?", "<think>2+2=4</think>4")]))
    assert tokenizer.decode(ids) == "2+2?<think>2+2=4</think>4"
    assert tokenizer.decode(ids, keep_special=True) == (
        "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜><think>2+2=4</think>4<｜end▁of▁sentence｜>"
    )


@given(roles, st.none() | plain.filter(bool))
def test_conversations_equal_apply_chat_template(tokenizer, hf, turns, system):
    messages = conversation(turns, system)
    ids, mask = tokenizer.encode_chat(messages)
    assert ids == hf.apply_chat_template(messages, return_dict=False)
    assert len(mask) == len(ids)
    prompt = messages[:-1]
    assert tokenizer.encode_prompt(prompt) == hf.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=False
    )


@given(roles.filter(lambda turns: not any("<" in part or "｜" in part for turn in turns for part in turn)))
def test_mask_covers_answers_and_their_stop_tokens_alone(tokenizer, turns):
    ids, mask = tokenizer.encode_chat(conversation(turns))
    supervised = tokenizer.decode((i for i, m in zip(ids, mask, strict=True) if m), keep_special=True)
    assert supervised == "".join(answer + EOS for _, answer in turns)


def test_a_question_is_the_start_of_its_answered_conversation(tokenizer):
    for question in draw_unique(SFT_MIX, 0, "test", 100):
        prompt = tokenizer.encode_prompt(question.prompt)
        ids, mask = tokenizer.encode_chat(conversation([(question.prompt, question.completion)]))
        assert ids[: len(prompt)] == prompt
        assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))


@given(turns=roles)
def test_a_pretrained_chatml_tokenizer_equals_transformers(chatml_folder, turns):
    from transformers import AutoTokenizer

    ours = load_tokenizer(chatml_folder)
    theirs = AutoTokenizer.from_pretrained(chatml_folder)
    messages = conversation(turns)
    ids, mask = ours.encode_chat(messages)
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == expected["input_ids"]
    clean = all(part and part.strip() == part and "<" not in part for turn in turns for part in turn)
    if clean:
        assert mask == expected["assistant_masks"]


def test_a_tokenizer_without_bos_uses_eos_for_it(chatml_folder):
    tokenizer = load_tokenizer(chatml_folder).check()
    assert tokenizer.bos_id == tokenizer.eos_id != tokenizer.pad_id


def test_copying_keeps_what_the_folder_means(folder, tokenizer, tmp_path):
    copied = copy_pretrained(str(folder), tmp_path / "copy")
    messages = conversation([("2+2?", "<think>2+2=4</think>4")])
    assert copied.encode_chat(messages) == tokenizer.encode_chat(messages)


def edited(folder, target, **config):
    copy_pretrained(str(folder), target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_a_template_that_drops_thinking_is_refused_where_something_was_thought(folder, tmp_path):
    bad = copy_pretrained(str(edited(folder, tmp_path / "bad", chat_template=DROPS_THINKING)), tmp_path / "out")
    assert any(bad.encode_chat(conversation([("2+2?", "4")]))[1])
    with pytest.raises(UserError, match=r"drops <think>\.\.\.</think> from answers.*tokenizer\.name=train"):
        bad.encode_chat(conversation([("2+2?", "<think>2+2=4</think>4")]))


def test_a_template_that_drops_questions_is_refused(folder, tmp_path):
    template = DEEPSEEK_TEMPLATE.replace("'<｜User｜>' + message['content']", "'<｜User｜>'")
    with pytest.raises(UserError, match="drops what the user says"):
        copy_pretrained(str(edited(folder, tmp_path / "bad", chat_template=template)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_turns(folder, tmp_path):
    bad = load_tokenizer(edited(folder, tmp_path / "bad", chat_template=LATER_TURNS_REWRITE)).check()
    turn = ("2+2?", "<think>2+2=4</think>4")
    assert any(bad.encode_chat(conversation([turn]))[1])
    with pytest.raises(UserError, match="rewrites turn 2 of 4"):
        bad.encode_chat(conversation([turn, turn]))


def test_a_template_that_never_stops_is_refused(folder, tmp_path):
    bad = edited(folder, tmp_path / "bad", chat_template=DEEPSEEK_TEMPLATE.replace(" + eos_token", ""))
    with pytest.raises(UserError, match="does not end an answer with the eos token"):
        load_tokenizer(bad).check()


def test_a_template_with_another_generation_prompt_is_refused(folder, tmp_path):
    template = DEEPSEEK_TEMPLATE.replace("prompt %}{{ '<｜Assistant｜>' }}", "prompt %}{{ 'Assistant:' }}")
    bad = edited(folder, tmp_path / "bad", chat_template=template)
    with pytest.raises(UserError, match="prompt ends with 'Assistant:', but .* goes on with '<｜Assistant｜>4"):
        load_tokenizer(bad).check()


def test_a_template_with_a_syntax_error_names_the_line(folder, tmp_path):
    bad = edited(folder, tmp_path / "bad", chat_template="{{ bos_token }}\n{% if %}")
    with pytest.raises(UserError, match="chat template, line 2"):
        load_tokenizer(bad)


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(UserError, match="roles are system, user and assistant, not tool"):
        tokenizer.encode_prompt([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, "has no chat template"),
        ({"eos_token": "<nowhere>"}, 'eos_token "<nowhere>" is not in its vocabulary'),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(folder, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(edited(folder, tmp_path / "bad", **change))


def test_a_damaged_or_missing_tokenizer_file_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer\.json"):
        load_tokenizer(tmp_path)
    copy_pretrained(str(folder), tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a fast tokenizer"):
        load_tokenizer(tmp_path / "bad")


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(UserError, match=r"vocab_size=200 is too small.*need 263"):
        train_bpe(TEXTS, 200)


def test_an_unreachable_hub_name_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r'tokenizer\.name="no-org/no-name".*HF_ENDPOINT.*tokenizer\.name=train'):
        copy_pretrained("no-org/no-name", tmp_path / "out")
    with pytest.raises(UserError, match="not a hub name like org/name"):
        copy_pretrained("not a name", tmp_path / "out")

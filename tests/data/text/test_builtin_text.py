"""Built-in documents: true, varied, of the right size."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.chat.chat_templates import PLAIN
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.text.builtin_text import KINDS, dialogue_at, document_at
from ray_pipeline.rewards.registry import get_reward

FACT = re.compile(r"(?<![\d+\-*/x])(\d+)([+\-*/])(\d+)=(\d+)(?![\d+\-*/x])")
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_every_stated_fact_is_true(seed, index):
    for a, op, b, c in FACT.findall(document_at(seed, index)):
        assert OPERATIONS[op](int(a), int(b)) == int(c)


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_each_kind_is_clean_text_of_a_few_lines(kind):
    for seed in range(50):
        text = kind(Random(seed))
        assert 50 < len(text) < 900
        assert text == text.strip() and text.isascii() and "{" not in text


def test_documents_are_deterministic_and_hardly_ever_repeat():
    documents = [document_at(0, index) for index in range(2000)]
    assert documents[1234] == document_at(0, 1234)
    assert len(set(documents)) > 1990
    assert document_at(1, 0) != documents[0]


def test_the_vocabulary_is_small():
    vocabulary = {word for i in range(2000) for word in re.findall(r"[A-Za-z]+", document_at(0, i))}
    assert 100 < len(vocabulary) < 400


def test_dialogues_are_right_and_two_in_five_are_worked_out():
    made = [dialogue_at(0, index) for index in range(1000)]
    at_once = 0
    for text in made:
        question, answer = text.removeprefix("User: ").split("\nAssistant:\n")
        reference = answer.rpartition("The answer is ")[2].removesuffix(".")
        assert get_reward("answer")(question, answer, reference) == 1.0
        at_once += answer.startswith("The answer is ")
    assert 550 < at_once < 650
    assert dialogue_at(1, 0) != made[0] == dialogue_at(0, 0)


def test_a_chat_in_the_plain_template_is_a_dialogue_of_the_text_token_for_token(tmp_path):
    made = [dialogue_at(0, index) for index in range(300)]
    tokenizer = save_trained(train_bpe(made, 400), tmp_path, PLAIN)
    for text in made[:50]:
        question, answer = text.removeprefix("User: ").split("\nAssistant:\n")
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        tokens, trained = tokenizer.encode_chat(chat)
        assert tokens == tokenizer.encode_document(text)
        prompt = tokenizer.encode_prompt(question)
        assert tokens[: len(prompt)] == prompt and trained == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))

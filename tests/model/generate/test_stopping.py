"""Text comes out whole, and answers stop where their text says so."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.generate.stopping import StopStrings, StopWatch, TextStream, ThinkBudget, ThinkWatch

# Tokens of some bytes each, as a byte-level tokenizer has them: characters begin and end inside tokens.
byte_tokens = st.lists(st.binary(max_size=5), max_size=30)
texts = st.text(alphabet="ab é日🙂", max_size=30)


def bytes_text(vocabulary: list[bytes]):
    return lambda ids: b"".join(vocabulary[i] for i in ids).decode("utf-8", errors="replace")


def words_text(vocabulary: list[str]):
    """As sentencepiece does: a space before each word, but for the first."""
    return lambda ids: "".join(vocabulary[i] for i in ids).replace("_", " ").removeprefix(" ")


@given(byte_tokens, st.integers(0, 5))
def test_pieces_together_are_the_text_of_all_tokens(vocabulary, before):
    decode, ids = bytes_text(vocabulary), list(range(len(vocabulary)))
    whole, head = decode(ids), decode(ids[:before])
    stream = TextStream(decode, ids[:before])
    text = "".join([stream.add(i) for i in ids[before:]] + [stream.finish()])
    if not head.endswith("\ufffd"):  # else what was already shown is not the beginning of the text
        assert head + text == whole
    assert stream.finish() == ""


@given(texts, st.data())
def test_a_character_is_held_back_until_it_is_whole(text, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    vocabulary = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    stream = TextStream(bytes_text(vocabulary))
    pieces = [stream.add(i) for i in range(len(vocabulary))]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.sampled_from(["_the", "_cat", "s", "", "_", "."]), max_size=30))
def test_spaces_between_words_survive_tokens_without_text(vocabulary):
    decode = words_text(vocabulary)
    stream = TextStream(decode)
    text = "".join([stream.add(i) for i in range(len(vocabulary))] + [stream.finish()])
    assert text == decode(list(range(len(vocabulary))))


def test_streaming_decodes_a_few_tokens_at_a_time():
    seen = []

    def decode(ids: list[int]) -> str:
        seen.append(len(ids))
        return "a" * len(ids)

    stream = TextStream(decode)
    for i in range(100):
        stream.add(i)
    assert max(seen) <= 3


@given(texts, st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_the_text_is_cut_before_the_first_stop_string_wherever_tokens_end(text, strings, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    vocabulary = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    decode = bytes_text(vocabulary)
    watch = StopWatch(strings, decode)
    shown = ""
    for i in range(len(vocabulary)):
        stops = watch.add(i)
        so_far = decode(list(range(i + 1))).rstrip("\ufffd")
        found = [so_far.index(s) for s in strings if s in so_far]
        assert stops == bool(found)
        safe = watch.text[: watch.safe()]
        assert safe.startswith(shown)  # what was shown never has to be taken back
        shown = safe
        if stops:
            assert watch.text == watch.finish() == so_far[: min(found)] == shown
            assert watch.stopped in strings
            return
    assert watch.finish() == text and watch.stopped is None


def test_a_stop_string_in_held_back_bytes_is_found_at_the_end():
    watch = StopWatch(["\ufffd"], lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert not watch.add(0x61) and not watch.add(0xF0)
    assert watch.finish() == "a" and watch.stopped == "\ufffd"


def test_without_stop_strings_all_text_is_safe_to_show():
    watch = StopWatch([], words_text(["_a", "_b"]), before=[0])
    assert not watch.add(1) and watch.text == " b" and watch.safe() == 2


@pytest.mark.parametrize("strings", [(), ("",), ("a", "")])
def test_an_empty_stop_string_is_refused(strings):
    with pytest.raises(ValueError, match="an empty one is part of every text"):
        StopStrings(strings, str)


OPEN, CLOSE = 90, 91


def follow(budget: ThinkBudget, prompt: list[int], wishes: list[int]) -> list[int]:
    """What is written where the model would say `wishes`."""
    watch, out = ThinkWatch(budget, prompt), []
    for wish in wishes:
        out.append(wish if watch.forced is None else watch.forced)
        watch.add(out[-1])
    return out


@given(st.integers(0, 8), st.lists(st.sampled_from([1, 2, OPEN, CLOSE]), max_size=40), st.booleans())
def test_no_more_than_the_budget_is_thought(budget, wishes, opened):
    out = follow(ThinkBudget(budget, (OPEN,), (CLOSE,)), [1, OPEN] if opened else [1], wishes)
    inside, spent = opened, 0
    for token in out:
        if token == CLOSE:
            inside = False
        elif inside:
            spent += 1
        elif token == OPEN:
            inside = True
        assert spent <= budget


def test_thinking_within_the_budget_is_free_and_marks_may_be_several_tokens():
    budget = ThinkBudget(3, (8, 9), (6, 7))
    assert follow(budget, [], [8, 9, 1, 6, 7, 2, 2, 2]) == [8, 9, 1, 6, 7, 2, 2, 2]
    assert follow(budget, [], [8, 9, 1, 1, 1, 1, 1, 1]) == [8, 9, 1, 1, 1, 6, 7, 1]
    assert follow(budget, [8, 9, 5, 5, 5, 5], [1] * 6) == [1, 1, 1, 6, 7, 1]  # the prompt's tokens are not counted
    assert follow(budget, [8, 9, 6, 7], [1] * 6) == [1] * 6
    assert follow(budget, [], [8, 9, 1, 1, 6, 7, 8, 9, 1, 1]) == [8, 9, 1, 1, 6, 7, 8, 9, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, (1,), (2,)), "a think budget of -1 tokens: must be 0 or more"),
        ((1, (), (2,)), r"opening=\(\), closing=\(2,\): both need at least one token id"),
        ((1, (1,), ()), "both need at least one token id"),
    ],
)
def test_an_impossible_think_budget_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ThinkBudget(*arguments)

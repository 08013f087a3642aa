"""Plain text becomes documents by the rule of the settings: whole, in order, in linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.files import local_files, text_files
from ray_pipeline.data.files.text_files import TextRule, read_text_documents
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig

KINDS = ("auto", "file", "paragraphs", "lines")


def documents_of(path, content, rule, chunk=None):
    path.write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        if chunk is not None:
            patch.setattr(local_files, "_CHUNK", chunk)
            patch.setattr(text_files, "_WAITING", max(chunk, 30))
        return list(read_text_documents(path, rule))


@given(
    st.lists(st.text(alphabet="ab \n", min_size=1, max_size=50), min_size=1, max_size=40),
    st.integers(1, 64),
    st.sampled_from(KINDS),
)
def test_documents_hold_all_words_in_order(tmp_path_factory, paragraphs, chunk, kind):
    content = "\n\n".join(paragraphs) or " "
    path = tmp_path_factory.mktemp("t") / "a.txt"
    documents = documents_of(path, content + "x", TextRule(kind, "||", 30), chunk)
    assert all(document.strip() for document in documents)
    assert "".join("".join(documents).split()) == "".join((content + "x").split())
    if kind in ("auto", "paragraphs"):
        assert max(map(len, documents)) <= 60


@given(st.lists(st.text(alphabet="ab|\n", min_size=1, max_size=30), min_size=2, max_size=9), st.integers(1, 40))
def test_what_stands_between_separators_is_a_document_however_the_chunks_fall(tmp_path_factory, texts, chunk):
    content = "<|end|>".join(texts)
    path = tmp_path_factory.mktemp("t") / "a.txt"
    expected = [text for text in content.split("<|end|>") if text.strip()]
    assert documents_of(path, content, TextRule("auto", "<|end|>", 4), chunk) == expected


def test_a_separated_document_may_be_long_and_a_separator_is_no_text(tmp_path):
    stories = [f"Story {i}. " + "word " * 3000 for i in range(5)]
    content = "".join(f"{story}\n<|endoftext|>\n" for story in stories)
    documents = documents_of(tmp_path / "a.txt", content, TextRule())
    assert [document.strip() for document in documents] == [story.strip() for story in stories]
    assert min(map(len, documents)) > 15_000


def test_the_rule_can_be_set(tmp_path):
    content = "one\ntwo\n\nthree<|endoftext|>four\n"
    found = {
        (kind, separator): documents_of(tmp_path / "a.txt", content, TextRule(kind, separator, 2000))
        for kind in KINDS
        for separator in ("<|endoftext|>", None)
    }
    end = "<|endoftext|>"
    assert found["auto", end] == found["file", end] == ["one\ntwo\n\nthree", "four\n"]
    assert found["auto", None] == found["file", None] == found["paragraphs", None] == [content]
    assert found["paragraphs", end] == ["one\ntwo\n\nthree", "four\n"]
    assert found["lines", end] == ["one", "two", "three", "four"]
    assert found["lines", None] == ["one", "two", f"three{end}four"]


def test_a_merged_document_fills_a_row_unless_the_settings_say_otherwise():
    assert TextRule.of(DataConfig(seq_len=256)).characters == 2000
    assert TextRule.of(DataConfig(seq_len=4096)).characters == 16384
    given = DataConfig(text_documents="lines", text_separator=None, text_characters=7)
    assert TextRule.of(given) == TextRule("lines", None, 7)


def test_a_document_too_long_for_memory_is_cut_at_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST", 100)
    content = "".join(f"line {i} of the log\n" for i in range(200))
    documents = documents_of(tmp_path / "a.txt", content, TextRule("file"), chunk=30)
    assert "".join(documents) == content and max(map(len, documents)) <= 200
    assert all(document.strip().startswith("line") for document in documents)


def test_paragraphs_are_merged_up_to_a_sensible_size(tmp_path):
    content = "\n\n".join(f"Speaker {i}:\n" + "word " * 20 for i in range(200))
    documents = documents_of(tmp_path / "play.txt", content, TextRule())
    assert all(document.startswith("Speaker") for document in documents)
    assert 1500 < sum(map(len, documents)) / len(documents) <= 2000


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path):
    content = "".join(f"line {i} of the log\n" for i in range(2000))
    documents = documents_of(tmp_path / "log.txt", content, TextRule())
    assert len(documents) > 10
    assert all(document.strip().startswith("line") for document in documents)


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_line_ends_is_cut_in_linear_time(tmp_path, kind):
    path = tmp_path / "a.txt"
    path.write_text(("x" * 1_000_000 + "😀") * 16)
    start = time.process_time()
    documents = list(read_text_documents(path, TextRule(kind)))
    assert sum(map(len, documents)) == 16_000_016
    assert time.process_time() - start < 4  # copying what is left for every piece took ten


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="the file is empty"):
        list(read_text_documents(tmp_path / "a.txt", TextRule()))

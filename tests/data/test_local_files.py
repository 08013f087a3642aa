"""Local files: whole, in order, with errors that name the line or the byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data import local_files
from ray_pipeline.data.local_files import check_file, check_utf8, read_records, read_utf8
from ray_pipeline.errors import UserError

text = st.text(alphabet=st.sampled_from("abé€😀 \n\r\t"), max_size=80)


@given(text, st.integers(1, 9))
def test_text_is_read_whole_however_the_chunks_fall(tmp_path_factory, content, chunk):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "_CHUNK", chunk)
        read = "".join(read_utf8(path))
    assert read == content.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("before", [0, 10, (1 << 22) - 1, (1 << 22) + 5])
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, before):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a" * before + b"\xe9t\xe9" + b"b" * 10)
    with pytest.raises(UserError, match=rf"byte {before} \(0xe9\) is not UTF-8.*iconv"):
        check_utf8(path)


def pack(path, content: bytes, suffix: str):
    """Write `content` as path + suffix, in two frames as `cat a.gz b.gz` makes them."""
    import pyarrow

    packed = path.with_name(path.name + suffix)
    half = len(content) // 2
    with packed.open("wb") as file:
        for part in (content[:half], content[half:]):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, {".gz": "gzip", ".zst": "zstd"}[suffix]) as stream:
                stream.write(part)
            file.write(sink.getvalue())
    return packed


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, suffix):
    lines = "".join(f'{{"text": "é {i}"}}\n' for i in range(3000)).encode()
    path = pack(tmp_path / "a.jsonl", lines, suffix)
    told = []
    read = list(read_records(path, lambda *call: told.append(call)))
    assert [record["text"] for _, record in read] == [f"é {i}" for i in range(3000)]
    assert read[2999][0] == f"{path}:3000"
    assert told[-1] == (path, path.stat().st_size)
    assert "".join(read_utf8(pack(tmp_path / "a.txt", b"one\r\ntwo", suffix))) == "one\ntwo"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: not a whole {suffix} file \(.*Write it again"):
        list(read_records(path))


def test_how_far_a_file_is_read_is_told_in_its_bytes(tmp_path):
    import pyarrow.parquet

    path, told = tmp_path / "a.parquet", []
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 3000}), path)
    list(read_records(path, lambda _, done: told.append(done)))
    assert told == sorted(told) and len(told) == 3 and told[-1] == path.stat().st_size


def test_a_character_cut_off_at_the_end_is_named(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes(b"abc" + "€".encode()[:2])
    with pytest.raises(UserError, match="byte 3 "):
        check_utf8(path)


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert [record for _, record in read_records(path)] == [{"text": "a"}]


def test_a_file_of_white_space_is_refused(tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text(" \n\n\t ")
    with pytest.raises(UserError, match="only white space"):
        check_utf8(path)


def test_missing_and_unfit_files_say_what_to_do(tmp_path):
    (tmp_path / "stories.txt").write_text("x")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "table.parquet.gz").write_text("x")
    cases = {
        "storeis.txt": r'no such file \(did you mean "stories\.txt"\?\)',
        "nowhere/stories.txt": r"no such file \(there is no folder .*nowhere\)",
        "empty.txt": "the file is empty",
        "data.csv": r'files end in \.txt, \.json, \.jsonl, \.parquet, not "\.csv"',
        "": "is a folder",
        "table.parquet.gz": "parquet is compressed inside",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            check_file(tmp_path / name)


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9), min_size=1), max_size=8), st.integers(1, 40))
def test_jsonl_gives_every_record_with_its_line(tmp_path_factory, records, chunk):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    # A blank line between any two counts as a line and holds nothing.
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) or "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "_CHUNK", chunk)
        read = list(read_records(path))
    assert read == [(f"{path}:{2 * i + 1}", record) for i, record in enumerate(records)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a\.jsonl:2: not valid JSON"),
        ("[1]", r"a\.jsonl:2: must be a JSON object, but is a list"),
        (r'{"text": "\ud83d"}', r"a\.jsonl:2: holds half a character \('\\ud83d'\)"),
        ("[" * 100_000, r"a\.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_records(path))


def test_a_json_file_is_an_array_of_records(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text": "\\ud83d\\ude00"}]')
    assert list(read_records(path)) == [(f"{path}[0]", {"text": "a"}), (f"{path}[1]", {"text": "😀"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"},\n{"text"}]', r"a\.json:2: not valid JSON \(.*one array of objects.*\.jsonl"),
        ('{"text": "a"}', r"a\.json: must hold an array of objects, but holds a dict"),
        ('[{"text": "a"}, 3]', r"a\.json\[1\]: must be a JSON object, but is a int"),
        ("[" * 100_000, r"a\.json: not valid JSON"),
    ],
)
def test_a_bad_json_file_says_where(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_records(path))


def test_parquet_gives_rows_and_damage_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    assert list(read_records(path)) == [(f"{path}:row 1", {"text": "a"}), (f"{path}:row 2", {"text": "b"})]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="not a whole parquet file"):
        list(read_records(path))

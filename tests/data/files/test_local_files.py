"""Local files: whole, in order, with errors that name the line or the byte."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.files import local_files
from ray_pipeline.data.files.local_files import check_file, check_utf8, read_utf8
from ray_pipeline.data.files.record_files import read_records
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
    assert told == sorted(told) and told[-1] == path.stat().st_size


def test_a_character_cut_off_at_the_end_is_named(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes(b"abc" + "€".encode()[:2])
    with pytest.raises(UserError, match="byte 3 "):
        check_utf8(path)


def test_a_file_of_white_space_is_refused(tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text(" \n\n\t ")
    with pytest.raises(UserError, match="only white space"):
        check_utf8(path)


def test_missing_and_unfit_files_say_what_to_do(tmp_path):
    (tmp_path / "stories.txt").write_text("x")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "data.xlsx").write_text("a,b")
    (tmp_path / "table.parquet.gz").write_text("x")
    cases = {
        "storeis.txt": r'no such file \(did you mean "stories\.txt"\?\)',
        "nowhere/stories.txt": r"no such file \(there is no folder .*nowhere\)",
        "empty.txt": "the file is empty",
        "data.xlsx": r'files end in \.txt, \.json, \.jsonl, \.csv, .*, not "\.xlsx"',
        "": "is a folder",
        "table.parquet.gz": "parquet is compressed inside",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            check_file(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"text": "a"}'), r"is compressed by gzip, not plain text\. Call it a\.jsonl\.gz"),
        ("{}".encode("utf-16"), "is UTF-16, not UTF-8.*iconv -f utf-16 -t utf-8 a.jsonl > utf8-a.jsonl"),
        ('{"text": "a"}'.encode("utf-16-le"), "is UTF-16, not UTF-8.*iconv -f utf-16le"),
        ('{"text": "a"}'.encode("utf-16-be"), "is UTF-16, not UTF-8.*iconv -f utf-16be"),
        ("{}".encode("utf-32"), "is UTF-32, not UTF-8.*iconv -f utf-32"),
        (b"PAR1....", r"is a parquet file, not plain text\. Let its name end in \.parquet"),
        (b"PK\x03\x04....", "is a zip archive"),
    ],
    ids=["gzip", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "parquet", "zip"],  # gzip's bytes hold the time
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        check_file(path)


@given(st.text(min_size=1, max_size=9).filter(lambda text: "\0" not in text))
def test_text_is_taken_for_nothing_else(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes(text.encode())
    check_file(path)

"""Records of every kind of file, with their places; what cannot be read is named."""

from __future__ import annotations

import json
import re
import time
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_pipeline.data.files import local_files
from ray_pipeline.data.files.fields import BadRecord
from ray_pipeline.data.files.json_arrays import array_entries
from ray_pipeline.data.files.record_files import OutOfRange, read_records
from ray_pipeline.errors import UserError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert [record for _, record in read_records(path)] == [{"text": "a"}]


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
    good, (place, bad) = read_records(path)
    assert good[1] == {"text": "good"} and re.search(message, f"{place}: {bad}")


def test_a_json_file_is_an_array_of_records(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text": "\\ud83d\\ude00"}]')
    assert list(read_records(path)) == [(f"{path}[0]", {"text": "a"}), (f"{path}[1]", {"text": "😀"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"},\n{"text"}]', r"a\.json:2: not valid JSON \(.*one array of objects.*\.jsonl"),
        ('{"text": "a"}', r"a\.json: must hold an array of objects, but begins with"),
        ("[" * 100_000, r"a\.json:1: not valid JSON"),
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


@example([-0.0, 1e300, 12, 1.5e-7], 2, None, False)
@given(st.lists(json_values, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_an_array_is_read_whole_however_the_pieces_fall(values, size, indent, ascii_only):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    pieces = (text[at : at + size] for at in range(0, len(text), size))
    assert [entry.value for entry in array_entries(pieces)] == values


@given(st.text(alphabet='[]{},:"a1 \n\\tru', max_size=20), st.integers(1, 5))
def test_an_array_is_read_or_refused_as_json_does(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("a") / "a.json"
    path.write_text(text or " ")
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "_CHUNK", size)
        if isinstance(expected, list):
            read = [record for _, record in read_records(path)]
            assert [r if isinstance(r, dict) else None for r in read] == [
                r if isinstance(r, dict) else None for r in expected
            ]
        else:
            with pytest.raises(UserError, match=r"a\.json"):
                list(read_records(path))


def test_a_large_array_takes_time_in_proportion_and_little_memory(tmp_path):
    """20 MB with escapes, each of which sent a reader of the whole text through all of it again."""
    path, record = tmp_path / "a.json", json.dumps({"text": "x\ud83d\ude00 " * 400})
    count = 20_000_000 // len(record)
    with path.open("w") as file:
        file.write("[\n" + ",\n".join([record] * count) + "\n]\n")
    start = time.process_time()
    assert sum(1 for _ in read_records(path)) == count
    assert time.process_time() - start < 30  # a second or two; minutes where the time grows with the square
    tracemalloc.start()
    for _ in read_records(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def test_a_long_line_is_put_together_once(tmp_path, monkeypatch):
    path, text = tmp_path / "a.jsonl", "x" * 4_000_000
    path.write_text(json.dumps({"text": text}) + '\n{"text": "b"}')
    monkeypatch.setattr(local_files, "_CHUNK", 1 << 10)
    start = time.process_time()
    assert [record["text"] for _, record in read_records(path)] == [text, "b"]
    assert time.process_time() - start < 10


def test_an_entry_that_is_no_object_is_given_as_a_bad_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 3, {"text": "\\ud83d"}]')
    assert [str(record) for _, record in read_records(path)] == [
        "{'text': 'a'}", "must be a JSON object, but is a int", "holds half a character ('\\ud83d'), which is no text"
    ]  # fmt: skip


def test_csv_is_read_by_its_first_line(tmp_path):
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_text(f'question,answer\n"2+2,\nyou say?",4\n\n7,007\na,b,c\nlong,{long}\n')
    read = list(read_records(path))
    assert read[0] == (f"{path}:3", {"question": "2+2,\nyou say?", "answer": "4"})
    assert read[1] == (f"{path}:5", {"question": "7", "answer": "007"})
    assert read[2][0] == f"{path}:6" and isinstance(read[2][1], BadRecord)
    assert str(read[2][1]) == "has 3 fields, but the first line names 2"
    assert read[3][1]["answer"] == long
    (tmp_path / "a.tsv").write_text("text\tnote\na,b\tc\n")
    assert [r for _, r in read_records(tmp_path / "a.tsv")] == [{"text": "a,b", "note": "c"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question;answer\n1;2\n", 'its columns are parted by ";"'),
        ("a,a\n1,2\n", "its first line must name each column, and differently"),
        ("a,\n1,2\n", "its first line must name each column"),
        ('a,b\n"x"y,2\n', r"a\.csv:2: not valid CSV"),
    ],
)
def test_a_csv_file_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_records(path))


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "stream.arrow"])
def test_arrow_files_give_rows_in_either_format(tmp_path, name):
    import pyarrow

    path, table = tmp_path / name, pyarrow.table({"text": ["a", "b"], "turns": [[{"role": "user"}], []]})
    new = pyarrow.ipc.new_stream if name.startswith("stream") else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)
    assert [record for _, record in read_records(path)] == table.to_pylist()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="not a whole Arrow file"):
        list(read_records(path))


def test_dates_beyond_pythons_do_no_harm_where_nobody_reads_them(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path, far = tmp_path / "a.parquet", 2**62
    when = pyarrow.array([far, 0, None], pyarrow.timestamp("us"))
    inside = pyarrow.array([{"when": far}, {"when": 0}, None], pyarrow.struct([("when", pyarrow.timestamp("us"))]))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "when": when, "inside": inside}), path)
    records = [record for _, record in read_records(path)]
    assert [record["text"] for record in records] == ["a", "b", "c"]
    assert isinstance(records[0]["when"], OutOfRange) and isinstance(records[0]["inside"], OutOfRange)
    assert records[1]["when"].year == 1970 and records[2]["when"] is None

"""60 odd data files: each is read to its end and tokenised, or refused in one message, within ten seconds."""

from __future__ import annotations

import datetime
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.sources import sources
from ray_pipeline.errors import UserError
from tests.fuzz.driving import Hung, clock, end_of, report

pytestmark = pytest.mark.slow

TEXT = {"text": "the owl sat on the mat and said: two and two make four"}
CHAT = {"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]}
QUESTION = {"question": "What is 2+2?", "answer": "4"}
PAIR = {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"}
GOOD = [TEXT, CHAT, QUESTION, PAIR]


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def nested(depth: int) -> bytes:
    return b'{"text": ' + b"[" * depth + b"]" * depth + b"}\n"


TEXTS = ["one owl", "two owls"]
FAR = pa.array([2**62, -(2**62)], pa.int64()).cast(pa.timestamp("us"), safe=False)
ODD: dict[str, bytes | Callable[[Path], None]] = {
    "empty.jsonl": b"", "empty.json": b"", "empty.txt": b"", "empty.parquet": b"", "empty.jsonl.gz": b"",
    "space.jsonl": b" \n\n\t\n", "space.txt": b" \n\x0c\n \n", "bom.jsonl": b"\xef\xbb\xbf",
    "bom.txt": b"\xef\xbb\xbfowl",
    "utf16.jsonl": lines(TEXT).decode().encode("utf-16"), "utf16.txt": "an owl".encode("utf-16-le"),
    "utf32.json": json.dumps([TEXT]).encode("utf-32"), "latin1.txt": "naïve".encode("latin-1"),
    "gbk.jsonl": '{"text": "中文"}'.encode("gbk"), "shiftjis.txt": "日本語".encode("shift-jis"),
    "nul.txt": b"an owl\x00 sat\x00", "nul.jsonl": lines({"text": "a\x00b"}), "nulbytes.jsonl": b"\x00" * 5000,
    "control.txt": bytes(range(1, 32)) + b"owl", "crlf.jsonl": lines(*GOOD).replace(b"\n", b"\r\n"),
    "cr.jsonl": lines(TEXT, TEXT).replace(b"\n", b"\r"), "cr.txt": b"one\rtwo\r\rthree",
    "u2028.jsonl": json.dumps({"text": "a\u2028b\u2029c\x85d"}, ensure_ascii=False).encode() + b"\n",
    "u2028.txt": "a\u2028b\u2029c\x85d".encode(), "surrogate.jsonl": b'{"text": "a\\ud800b"}\n',
    "surrogates.jsonl": json.dumps(CHAT).encode().replace(b"What", b"\\udc00").replace(b'"4"', b'"\\ud800"') + b"\n",
    "rawsurrogate.jsonl": b'{"text": "\xed\xa0\x80"}\n',
    "nan.jsonl": b'{"text": NaN}\n{"question": "?", "answer": NaN}\n',
    "infinity.jsonl": b'{"question": "how many?", "answer": -Infinity}\n',
    "huge.jsonl": b'{"question": "?", "answer": 1e999}\n',
    "digits.jsonl": b'{"question": "?", "answer": ' + b"9" * 6000 + b"}\n", "deep.jsonl": nested(20_000),
    "deep.json": nested(900),
    "doubled.jsonl": b'{"text": "a", "text": "b"}\n', "array.json": json.dumps(GOOD).encode(),
    "object.json": json.dumps(TEXT).encode(),
    "arrays.json": b"[[[]], [1]]", "comma.json": b'[{"text": "a"},]', "joined.json": b'{"text": "a"}{"text": "b"}',
    "cut.json": b'[{"text": "a"}, {"te', "cut.jsonl": lines(TEXT)[:-9],
    "scalars.jsonl": b'1\n"x"\nnull\ntrue\n[]\n{}\n',
    "types.jsonl": lines({"text": 3}, {"text": None}, {"text": []}),
    "nomessages.jsonl": lines({"messages": []}, {"messages": None}),
    "roles.jsonl": lines({"messages": [{"role": 3, "content": {}}]}, {"messages": [{"content": 1}, "x"]}),
    "names.jsonl": lines({"": "x", "\x00": "y", "text": "z", "a" * 5000: 1}),
    "longline.jsonl": lines({"text": "owl " * 500_000}),
    "longword.txt": b"x" * 5_000_000, "nolines.txt": b"the owl sat. " * 400_000,
    "pairs.jsonl": lines({"prompt": 1, "chosen": 2, "rejected": {}}),
    "cut.jsonl.gz": gzip.compress(lines(*GOOD * 500))[:-60],
    "twice.jsonl.gz": gzip.compress(gzip.compress(lines(*GOOD))),
    "bomb.txt.gz": gzip.compress(b"\n" * 30_000_000), "nozip.jsonl.gz": lines(*GOOD),
    "nozst.jsonl.zst": b"\x28\xb5\x2f\xfd" + b"x" * 90,
    "noise.parquet": os.urandom(900), "cut.parquet": b"PAR1" + b"\x00" * 40, "jsonl.parquet": lines(*GOOD),
    "times.parquet": parquet(text=TEXTS, when=FAR), "binary.parquet": parquet(text=[b"\xff\xfe", b"x"]),
    "nulls.parquet": parquet(text=pa.nulls(2)), "norows.parquet": parquet(text=pa.array([], pa.string())),
    "lists.parquet": parquet(text=[["a"], None]),
    "decimals.parquet": parquet(question=TEXTS, answer=pa.array([1, 2], pa.decimal128(38, 30))),
    "dates.parquet": parquet(question=TEXTS, answer=[datetime.date(1, 1, 1), datetime.date(9999, 12, 31)]),
    "emoji.jsonl": lines({"text": "👩‍👩‍👧‍👦" * 99 + "\u202e" + "e\u0301" * 99}),
    "folder.jsonl": lambda path: path.mkdir(),
    "loop.jsonl": lambda path: path.symlink_to(path.name), "pipe.jsonl": lambda path: os.mkfifo(path),
    "csv.csv": b'text,n\n"unclosed,1\n', "nocolumns.csv": b"\n\n", "noise.arrow": os.urandom(300),
}  # fmt: skip


def documents(source: sources.Source, tokenizer: ChatTokenizer) -> Iterator[object]:
    for text in sources.read_documents(source):
        yield tokenizer.encode_document(text)


def conversations(source: sources.Source, tokenizer: ChatTokenizer) -> Iterator[object]:
    for conversation in sources.read_conversations(source):
        yield tokenizer.encode_chats([conversation.chat()])


def questions(source: sources.Source, tokenizer: ChatTokenizer) -> Iterator[object]:
    for question in sources.read_questions(source):
        yield tokenizer.encode_prompt(question.prompt)


def preferences(source: sources.Source, tokenizer: ChatTokenizer) -> Iterator[object]:
    yield from sources.read_preferences(source)


READERS = {
    "--data": documents,
    "--sft-data": conversations,
    "--prompt-data": questions,
    "--preference-data": preferences,
}


def fault_of(read: Callable[[], Iterable[object]]) -> str | None:
    try:
        with clock():
            for _ in islice(read(), 5000):
                pass
    except UserError as error:
        return None if str(error).strip() else "refused without a word"
    except Hung:
        return "hung"
    except BaseException as error:  # noqa: BLE001  whatever it is, it should have been a UserError
        return f"{type(error).__name__}: {str(error)[:500]}"
    return None


def test_an_odd_data_file_is_read_to_its_end_or_refused(tmp_path: Path) -> None:
    assert len(ODD) >= 60
    tokenizer = save_trained(train_bpe([*TEXTS, TEXT["text"]] * 20, 400), tmp_path / "tokenizer")
    faults: list[tuple[object, str]] = []
    for name, content in ODD.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        for flag, read in READERS.items():
            dry = end_of(["run", "--dry-run", "--dpo", flag, str(path), "--output-dir", str(tmp_path / "runs")])
            if dry.fault is not None:
                faults.append((f"{name} {flag} --dry-run", dry.fault))
            if fault := fault_of(lambda r=read, p=path: r(sources.parse_source(str(p)), tokenizer)):
                faults.append((f"{name} {flag}", fault))
    assert not faults, report(faults)

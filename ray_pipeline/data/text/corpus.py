"""Clean documents on disk, in blocks, and which of them are used. No Ray, no tokenizer.

A block is one file: an arrow table, compressed, of documents of one source. It appears whole or not at all, so a broken
attempt goes on behind its last one. What is known of a document beside its text (digest, size) lies in columns of their
own and is read without the text; no process holds a list of all documents.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from ray_pipeline.data.shared.cleaning import clean_text, content_hash
from ray_pipeline.data.shared.decontaminate import Decontaminator
from ray_pipeline.records.artifacts import atomic_path, read_json, write_json

# A block is full at this many characters, or documents.
BLOCK_CHARACTERS = 4 << 20
BLOCK_DOCUMENTS = 20_000
# Digests compared at once: 40 bytes each while they are sorted. More documents are compared part by part.
DEDUP_DOCUMENTS = 8_000_000
DIGEST = 16  # bytes of a content hash
_SCHEMA = pa.schema(
    [("text", pa.large_string()), ("digest", pa.binary(DIGEST)), ("size", pa.int32()), ("contaminated", pa.bool_())]
)
_COLUMNS = {name: index for index, name in enumerate(_SCHEMA.names)}


@dataclass(frozen=True)
class RawBlock:
    """Documents of one source as they were read."""

    source: int
    texts: list[str]


@dataclass
class SourceFacts:
    """What became of a source's documents; `bytes` are the kept ones', as UTF-8."""

    read: int = 0
    empty: int = 0
    duplicates: int = 0
    contaminated: int = 0
    kept: int = 0
    bytes: int = 0


def in_blocks(documents: Iterable[tuple[int, str]]) -> Iterator[RawBlock]:
    """(source, text) pairs in blocks; where one ends depends on the documents alone."""
    texts: list[str] = []
    source = size = 0
    for number, text in documents:
        if texts and (number != source or size >= BLOCK_CHARACTERS or len(texts) >= BLOCK_DOCUMENTS):
            yield RawBlock(source, texts)
            texts, size = [], 0
        source = number
        texts.append(text)
        size += len(text)
    if texts:
        yield RawBlock(source, texts)


class Cleaner:
    """Makes a block's file of a raw block."""

    def __init__(self, finder: Decontaminator):
        self.finder = finder

    def __call__(self, block: RawBlock) -> bytes:
        """The cleaned documents that have any text, and how many were read."""
        texts = [text for text in map(clean_text, block.texts) if text]
        columns = [
            pa.array(texts, pa.large_string()),
            pa.array([bytes.fromhex(content_hash(text)) for text in texts], pa.binary(DIGEST)),
            pa.array([len(text.encode()) for text in texts], pa.int32()),
            pa.array([self.finder.contaminated(text) for text in texts], pa.bool_()),
        ]
        facts = {"source": str(block.source), "read": str(len(block.texts))}
        sink, options = io.BytesIO(), pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(sink, _SCHEMA.with_metadata(facts), options=options) as file:
            file.write_table(pa.table(columns, schema=_SCHEMA))
        return sink.getvalue()


def block_columns(block: Path | bytes, *names: str) -> tuple[dict[str, int], list[pa.Array]]:
    """The facts of a block ("source", "read") and some of its columns; what is not asked for is not unpacked."""
    indices = [_COLUMNS[name] for name in names]
    options = pa.ipc.IpcReadOptions(included_fields=indices or [_COLUMNS["size"]])
    with pa.ipc.open_file(block if isinstance(block, bytes) else str(block), options=options) as file:
        facts = {key.decode(): int(value) for key, value in file.schema.metadata.items()}
        table = file.read_all()
    return facts, [table[name].combine_chunks() for name in names]


def digest_array(column: pa.Array) -> NDArray[np.uint8]:
    """[documents, DIGEST] bytes."""
    return np.frombuffer(column.buffers()[1], np.uint8, count=len(column) * DIGEST).reshape(-1, DIGEST)


def hash_fractions(digests: NDArray[np.uint8]) -> NDArray[np.float64]:
    """`cleaning.hash_fraction` of many digests: [documents] in [0, 1)."""
    weights = 256.0 ** -np.arange(1, 7)
    return digests[:, :6].astype(np.float64) @ weights  # exact: 48 bits


class Corpus:
    """The blocks of a folder and what is known of them.

    Attributes:
        facts: of each source, once everything was read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts: list[SourceFacts] = []
        self._kept: NDArray[np.uint8] | None = None
        self._starts: NDArray[np.int64] = np.zeros(1, np.int64)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.arrow"

    def __len__(self) -> int:
        """Blocks."""
        return len(self._starts) - 1

    def written(self) -> tuple[int, int]:
        """(blocks, documents read into them) of an attempt that broke; what follows a gap is deleted."""
        blocks = read = 0
        while self.path(blocks).is_file():
            read += block_columns(self.path(blocks))[0]["read"]
            blocks += 1
        return blocks, read

    def add(self, number: int, block: bytes) -> None:
        """Write a block's file."""
        with atomic_path(self.path(number)) as aside:
            aside.write_bytes(block)

    def is_indexed(self) -> bool:
        """Whether every document was read and compared."""
        return (self.folder / "facts.json").is_file()

    def index(self, num_sources: int) -> None:
        """Compare all documents and note which are kept: of equal ones the first, none that is contaminated."""
        starts, facts, clean = [0], [SourceFacts() for _ in range(num_sources)], []
        for number in range(self.written()[0]):
            about, (contaminated,) = block_columns(self.path(number), "contaminated")
            flags = np.asarray(contaminated.to_numpy(zero_copy_only=False), bool)
            of = facts[about["source"]]
            of.read += about["read"]
            of.empty += about["read"] - len(flags)
            of.contaminated += int(flags.sum())
            starts.append(starts[-1] + len(flags))
            clean.append(np.packbits(~flags))
        self._starts = np.asarray(starts, np.int64)
        kept = self._first_occurrences(clean)
        for number in range(len(self)):
            about, (sizes,) = block_columns(self.path(number), "size")
            mine = kept[starts[number] : starts[number + 1]]
            of = facts[about["source"]]
            of.kept += int(mine.sum())
            of.bytes += int(sizes.to_numpy()[mine].sum())
            of.duplicates += int(np.unpackbits(clean[number], count=len(mine)).sum() - mine.sum())
        with atomic_path(self.folder / "kept.npz") as aside, aside.open("wb") as file:
            np.savez(file, kept=np.packbits(kept), starts=self._starts)
        write_json(self.folder / "facts.json", [asdict(of) for of in facts])

    def _first_occurrences(self, clean: Sequence[NDArray[np.uint8]]) -> NDArray[np.bool_]:
        """[documents]: whether a clean document is the first with its content; compared in parts by digest."""
        total = int(self._starts[-1])
        kept = np.zeros(total, bool)
        parts = -(-total // DEDUP_DOCUMENTS)
        for part in range(parts):
            digests, places = [], []
            for number, flags in enumerate(clean):
                _, (column,) = block_columns(self.path(number), "digest")
                found = digest_array(column)
                wanted = np.unpackbits(flags, count=len(found)).astype(bool)
                if parts > 1:
                    wanted &= (hash_fractions(found) * parts).astype(np.int64) == part
                digests.append(found[wanted])
                places.append(np.flatnonzero(wanted) + self._starts[number])
            halves = np.concatenate(digests).view(np.uint64)
            order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal digests the first comes first
            other = np.any(halves[order][1:] != halves[order][:-1], axis=1)
            kept[np.concatenate(places)[order[np.concatenate([[True], other])[: len(order)]]]] = True
        return kept

    def open(self) -> Corpus:
        """Read what `index` wrote."""
        self.facts = [SourceFacts(**of) for of in read_json(self.folder / "facts.json")]
        with np.load(self.folder / "kept.npz") as stored:
            self._kept, self._starts = stored["kept"], stored["starts"]
        return self

    def kept(self, number: int) -> NDArray[np.bool_]:
        """Which documents of a block are kept: [documents of the block]."""
        assert self._kept is not None, "open() comes first"
        start, stop = int(self._starts[number]), int(self._starts[number + 1])
        bits = np.unpackbits(self._kept[start // 8 : -(-stop // 8)])
        return bits[start % 8 :][: stop - start].astype(bool)

    def source(self, number: int) -> int:
        """The source of a block."""
        return block_columns(self.path(number))[0]["source"]

    def texts(self, number: int, wanted: NDArray[np.bool_]) -> list[Any]:
        """Texts of a block's wanted documents."""
        _, (texts,) = block_columns(self.path(number), "text")
        return list(texts.filter(pa.array(wanted)).to_pylist())

    def remove(self) -> None:
        """Delete the folder: its documents have become rows."""
        shutil.rmtree(self.folder)

"""Chosen documents into packed rows, shard after shard, going on where an attempt broke off."""

from __future__ import annotations

import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.rows.packing import Position, Row, count_targets, is_target, pack_placed
from ray_pipeline.data.rows.shards import PIECE, RowsManifest, ShardFile, Written, write_rows
from ray_pipeline.data.sources.sources import figure_names
from ray_pipeline.data.text.corpus import block_columns
from ray_pipeline.data.text.mixture import Choice
from ray_pipeline.data.text.ray_prepare import map_blocks
from ray_pipeline.records.artifacts import atomic_path
from ray_pipeline.records.progress import Report
from ray_pipeline.settings.schema import PipelineFields

Tokens = NDArray[np.uint32]
BEGIN = Position(0, 0)


class BlockTokenizer:
    """Tokenises the wanted documents of a block as bos + text + eos; what looks like a special token is spelled out."""

    def __init__(self, tokenizer_json: str, bos_id: int, eos_id: int):
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True
        self.bos_id, self.eos_id = bos_id, eos_id

    def __call__(self, block: tuple[bytes, NDArray[np.bool_]]) -> tuple[NDArray[np.int64], Tokens]:
        """(tokens of each document, all tokens one after another)"""
        _, (column,) = block_columns(block[0], "text")
        texts = column.filter(pa.array(block[1]))
        # One text at a time: the cores already have a block each.
        ids = [self._document(text.as_py()) for text in texts]
        return np.array([len(document) for document in ids], np.int64), np.concatenate(ids)

    def _document(self, text: str) -> Tokens:
        (encoded,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array([self.bos_id, *encoded.ids, self.eos_id], np.uint32)


@dataclass
class State:
    """How far the training rows are written.

    Attributes:
        visit: the visit that packing goes on in; its first `place.document` documents are packed.
        counts: [vocabulary], how often each token is a target. targets: of each source.
    """

    counts: NDArray[np.int64]
    visit: int = 0
    place: Position = BEGIN
    written: Written = field(default_factory=Written)
    targets: Counter[int] = field(default_factory=Counter)

    def save(self, path: Path) -> None:
        """Atomically."""
        values = {
            "visit": self.visit, "place": self.place, "targets": dict(self.targets), "rows": self.written.rows,
            "all_targets": self.written.targets, "files": [asdict(file) for file in self.written.files],
        }  # fmt: skip
        with atomic_path(path) as aside, aside.open("wb") as file:
            np.savez(file, counts=self.counts, values=np.array(json.dumps(values)))

    @classmethod
    def load(cls, path: Path, vocabulary: int) -> State:
        """What `save` wrote, or the beginning."""
        if not path.is_file():
            return cls(np.zeros(vocabulary, np.int64))
        with np.load(path) as stored:
            counts, values = stored["counts"], json.loads(str(stored["values"]))
        targets = Counter({int(source): count for source, count in values["targets"].items()})
        files = [ShardFile(**file) for file in values["files"]]
        written = Written(values["rows"], values["all_targets"], files)
        return cls(counts, values["visit"], Position(*values["place"]), written, targets)


class TextRows:
    """Tokenises and packs what was chosen into `folder/train` and `folder/validation`.

    Attributes:
        counts: [vocabulary], how often each token is a target of the training rows.
        datasets: for the manifest: rows, tokens, documents, bytes and sources of each split.
    """

    def __init__(self, config: PipelineFields, choice: Choice, tokenizer: ChatTokenizer, record: Path):
        """Args:
        record: file that keeps how far the training rows are written.
        """
        self.config, self.choice, self.tokenizer, self.record = config, choice, tokenizer, record
        self.datasets: dict[str, dict[str, Any]] = {}
        self.state = State.load(record, len(tokenizer))
        self._visit, self._first = 0, 0  # the visit packed from, and the number of its first document in the stream
        self._pending: list[tuple[int, Row]] = []  # whose targets are not counted yet, with their sources

    @property
    def counts(self) -> NDArray[np.int64]:
        return self.state.counts

    def write(self, folder: Path, report: Report) -> TextRows:
        """A pass over the corpus for each split; no document waits in memory."""
        uses = self.choice.sources
        rows = self._write(folder / "train", self._train_rows(report), written=self.state.written, save=True)
        entries = [{"documents": use.train, "bytes": use.used_bytes, "uses": use.uses} for use in uses]
        self._enter(f"{folder.name}/train", rows, entries, self.state.targets)
        # Apart, so that the loss of each source can be told: at most one row more a source.
        names = figure_names([source.name for source in self.config.data.pretrain])
        targets: Counter[int] = Counter()
        held: Counter[int] = Counter()
        packed = self._validation_rows(targets, held, report)
        rows = self._write(
            folder / "validation", packed, sources=lambda: {names[n]: count for n, count in held.items()}
        )
        entries = [{"documents": u.validation, "bytes": u.validation_bytes, "uses": u.validation} for u in uses]
        self._enter(f"{folder.name}/validation", rows, entries, targets)
        return self

    def _write(
        self,
        folder: Path,
        rows: Iterator[Row],
        *,
        sources: Callable[[], Mapping[str, int]] = dict,
        written: Written | None = None,
        save: bool = False,
    ) -> RowsManifest:
        return write_rows(
            folder,
            rows,
            seq_len=self.config.data.seq_len,
            vocab_size=len(self.tokenizer),
            tokens_per_shard=self.config.data.tokens_per_shard,
            sources=sources,
            written=written,
            on_shard=self._shard_is_whole if save else None,
        )

    def _train_rows(self, report: Report) -> Iterator[Row]:
        state, settings = self.state, self.config.data
        begin = state.place
        documents = self._documents(validation=False, report=report, visit=state.visit, document=begin.document)
        for row, source, place in pack_placed(documents, settings.seq_len, self.tokenizer.pad_id, begin.token):
            state.visit, state.place = self._visit, Position(place.document - self._first, place.token)
            self._pending.append((source, row))
            if len(self._pending) == PIECE:
                self._count_pending()
            yield row
        self._count_pending()

    def _validation_rows(self, targets: Counter[int], held: Counter[int], report: Report) -> Iterator[Row]:
        documents = self._documents(validation=True, report=report)
        for row, source, _ in pack_placed(documents, self.config.data.seq_len, self.tokenizer.pad_id):
            targets[source] += count_targets(row)
            held[source] += 1
            yield row

    def _count_pending(self) -> None:
        for source, rows in itertools.groupby(self._pending, key=lambda pair: pair[0]):
            tokens, segments, masks = (np.stack(values) for values in zip(*(row for _, row in rows), strict=True))
            found = tokens[:, 1:][is_target(segments, masks)]
            self.state.targets[source] += len(found)
            self.state.counts += np.bincount(found, minlength=len(self.state.counts))
        self._pending.clear()

    def _shard_is_whole(self, written: Written) -> None:
        self._count_pending()
        self.state.written = written
        self.state.save(self.record)

    def _documents(
        self, *, validation: bool, report: Report, visit: int = 0, document: int = 0
    ) -> Iterator[tuple[int, Tokens]]:
        """(source, tokens), from this document of this visit on."""
        tokenizer, phase = self.tokenizer, "tokenising held-out text" if validation else "tokenising"
        uses = self.choice.sources
        total = sum(use.validation_bytes if validation else use.used_bytes for use in uses)
        sent: deque[tuple[int, int, int, int]] = deque()  # of each block under way: visit, source, skipped, bytes
        arguments = (tokenizer.to_json(), tokenizer.bos_id, tokenizer.eos_id)
        done = stream = 0
        for lengths, ids in map_blocks(BlockTokenizer, arguments, self._blocks(validation, visit, document, sent)):
            self._visit, source, skipped, size = sent.popleft()
            self._first = stream - skipped
            for stop, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
                yield source, ids[stop - length : stop]
            stream, done = stream + len(lengths), done + size
            report(phase, done, total, "bytes")

    def _blocks(
        self, validation: bool, visit: int, document: int, sent: deque[tuple[int, int, int, int]]
    ) -> Iterator[tuple[bytes, NDArray[np.bool_]]]:
        """Blocks with their wanted documents from this document of this visit on."""
        before = 0
        for turn, (number, wanted) in enumerate(self.choice.visits(validation=validation)):
            path = self.choice.corpus.path(number)
            about, (sizes,) = block_columns(path, "size")
            size = int(sizes.to_numpy()[wanted].sum())
            if turn < visit:
                before += size
                continue
            skipped = document if turn == visit else 0
            wanted[np.flatnonzero(wanted)[:skipped]] = False
            if wanted.any():
                sent.append((turn, about["source"], skipped, size + before))
                before = 0
                yield path.read_bytes(), wanted

    def _enter(self, name: str, rows: RowsManifest, entries: list[dict[str, int]], targets: Counter[int]) -> None:
        """The manifest's entry of a split.

        Args:
            entries: of each source: documents, bytes, and `uses`, the documents as often as they are used.
        """
        sources = []
        for number, (facts, entry) in enumerate(zip(self.choice.facts(self.config.data), entries, strict=True)):
            # Every token but a document's first is a target once.
            sources.append(facts | entry | {"tokens": targets[number] + entry["uses"]})
        sums = {key: sum(source[key] for source in sources) for key in ("tokens", "documents", "bytes")}
        self.datasets[name] = {"rows": rows.rows, "targets": rows.targets, **sums, "sources": sources}

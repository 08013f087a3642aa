"""Packed rows on disk: plain binary files to memory-map, and rows.json that says what they hold, with SHA-256 sums."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ray_pipeline.artifacts import atomic_path, write_json
from ray_pipeline.data.packing import Row, is_target
from ray_pipeline.errors import UserError
from ray_pipeline.integrity import file_sha256

MANIFEST = "rows.json"
FORMAT = 1
FIELDS = ("tokens", "segments", "mask")
PIECE = 512  # rows that wait in memory before they are written


@dataclass(frozen=True)
class ShardFile:
    """One field of one shard: [rows, seq_len + 1] of `dtype`, row after row."""

    name: str
    field: str
    dtype: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceRows:
    """How many rows a source has; `name` is what its figures are called."""

    name: str
    rows: int


@dataclass(frozen=True)
class RowsManifest:
    """rows.json.

    Attributes:
        targets: supervised next-token targets over all rows.
        files: shard after shard, each with the fields tokens, segments, mask.
        sources: where no row holds documents of two sources: those that have rows, which lie source after source.
            Empty where rows are mixed, and in folders written before sources were told apart.
    """

    seq_len: int
    rows: int
    targets: int
    files: tuple[ShardFile, ...]
    sources: tuple[SourceRows, ...] = ()


@dataclass
class Written:
    """The whole shards that a folder has so far."""

    rows: int = 0
    targets: int = 0
    files: list[ShardFile] = field(default_factory=list)


def write_rows(
    folder: Path,
    rows: Iterable[Row],
    *,
    seq_len: int,
    vocab_size: int,
    tokens_per_shard: int,
    sources: Callable[[], Mapping[str, int]] = dict,
    written: Written | None = None,
    on_shard: Callable[[Written], None] | None = None,
) -> RowsManifest:
    """Write rows as shards, a piece at a time; the manifest comes last, so a folder with one is whole.

    Token ids take two bytes where the vocabulary allows.

    Args:
        sources: where rows are packed apart, asked when all are written: name of a source -> its rows, in their order.
        written: shards of an earlier attempt that `rows` goes on from.
        on_shard: told whenever a shard is whole, before the next row is asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    dtypes = {"tokens": "uint16" if vocab_size <= 1 << 16 else "uint32", "segments": "uint16", "mask": "uint8"}
    per_shard = max(1, tokens_per_shard // (seq_len + 1))
    written = written or Written()
    source = iter(rows)
    for number in itertools.count(len(written.files) // len(FIELDS)):
        first = next(source, None)
        if first is None:
            break
        shard = itertools.chain([first], itertools.islice(source, per_shard - 1))
        _write_shard(folder, number, shard, dtypes, written)
        if on_shard is not None:
            on_shard(written)
    apart = tuple(SourceRows(name, count) for name, count in sources().items())
    manifest = RowsManifest(seq_len, written.rows, written.targets, tuple(written.files), apart)
    write_json(folder / MANIFEST, {"format": FORMAT, **asdict(manifest)})
    return manifest


def _write_shard(folder: Path, number: int, rows: Iterator[Row], dtypes: Mapping[str, str], written: Written) -> None:
    """Write one shard's files and enter them; each appears whole or not at all."""
    before = written.rows
    names = {name: f"{number:05d}.{name}.bin" for name in FIELDS}
    sums = {name: hashlib.sha256() for name in FIELDS}
    sizes = dict.fromkeys(FIELDS, 0)
    with ExitStack() as stack:
        asides = {name: stack.enter_context(atomic_path(folder / file)) for name, file in names.items()}
        files = {name: stack.enter_context(aside.open("wb")) for name, aside in asides.items()}
        while piece := list(itertools.islice(rows, PIECE)):
            written.rows += len(piece)
            stacked = {name: np.stack([getattr(row, name) for row in piece]) for name in FIELDS}
            written.targets += int(np.count_nonzero(is_target(stacked["segments"], stacked["mask"])))
            for name in FIELDS:
                values = stacked[name].astype(np.dtype(dtypes[name]).newbyteorder("<"), copy=False)
                sums[name].update(values.data)
                sizes[name] += files[name].write(values.data)
    for name in FIELDS:
        count, digest = written.rows - before, sums[name].hexdigest()
        written.files.append(ShardFile(names[name], name, dtypes[name], count, sizes[name], digest))


def read_manifest(folder: Path) -> RowsManifest:
    """Read rows.json and check that its files are there in their full size (a stat each, no reading).

    Raises:
        UserError: missing or damaged, naming the file.
    """
    way_out = "Run the data_prep stage again (--stage data_prep)."
    path = folder / MANIFEST
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = raw.pop("format")
        files = tuple(ShardFile(**entry) for entry in raw.pop("files"))
        sources = tuple(SourceRows(**entry) for entry in raw.pop("sources", ()))
        manifest = RowsManifest(files=files, sources=sources, **raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {way_out}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged. {way_out}") from None
    if found != FORMAT:
        raise UserError(f"{path}: format {found} is not the {FORMAT} this version reads. {way_out}")
    for file in manifest.files:
        shard = folder / file.name
        size = shard.stat().st_size if shard.is_file() else None
        if size != file.bytes:
            state = "is missing" if size is None else f"has {size} bytes instead of {file.bytes}"
            raise UserError(f"{shard}: {state}. {way_out}")
    return manifest


def verify_files(folder: Path, manifest: RowsManifest) -> None:
    """Read every file and compare its SHA-256.

    Raises:
        UserError: naming the first damaged file.
    """
    for file in manifest.files:
        found = file_sha256(folder / file.name)
        if found != file.sha256:
            raise UserError(
                f"{folder / file.name}: the content changed since it was written (SHA-256 {found[:12]}, "
                f"expected {file.sha256[:12]}). Run the data_prep stage again (--stage data_prep)."
            )

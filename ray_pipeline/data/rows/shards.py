"""Packed rows on disk: plain binary files to memory-map, and rows.json that says what they hold, with SHA-256 sums."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ray_pipeline.data.rows.packing import Row, is_target
from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import atomic_path, write_sealed
from ray_pipeline.records.integrity import files_damage, make_again, read_sealed

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
    write_sealed(folder / MANIFEST, {"format": FORMAT, **asdict(manifest)})
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


def read_manifest(folder: Path, *, verify: bool = True) -> RowsManifest:
    """Read rows.json and hold its files against their SHA-256 sums, once on each machine.

    Args:
        verify: off where the files were written a moment ago.
    Raises:
        UserError: missing or damaged, naming the file.
    """
    way_out, path = make_again(folder.parent.parent), folder / MANIFEST
    raw = read_sealed(path, way_out)
    try:
        found = raw.pop("format")
        files = tuple(ShardFile(**entry) for entry in raw.pop("files"))
        sources = tuple(SourceRows(**entry) for entry in raw.pop("sources", ()))
        manifest = RowsManifest(files=files, sources=sources, **raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}). {way_out}") from None
    if found != FORMAT:
        raise UserError(f"{path}: format {found} is not the {FORMAT} this version reads. {way_out}")
    sums = {file.name: (file.sha256, file.bytes) for file in manifest.files}
    if verify and (problem := files_damage(folder, sums)):
        raise UserError(f"{problem}. {way_out}")
    return manifest

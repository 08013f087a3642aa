"""Packed rows as batches. Which rows a step gets depends on (seed, step) alone: no state, nothing to checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_pipeline.data.rows.batch import IGNORE, Batch, real_tokens
from ray_pipeline.data.rows.shards import FIELDS, ShardFile, read_manifest
from ray_pipeline.errors import UserError


@functools.lru_cache(maxsize=4)
def _epoch_order(total: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of one epoch; cached, as thousands of steps share it."""
    return np.random.default_rng([seed, epoch]).permutation(total)


def row_order(total: int, seed: int, step: int, batch_size: int, part: slice = slice(None)) -> list[int]:
    """Indices of one step's rows. Each epoch visits every row once, in an order of its own; batches cross epochs.

    Args:
        part: of the step's rows, those that are asked for.
    Raises:
        ValueError: when there are no rows.
    """
    if total < 1:
        raise ValueError("there are no rows to draw from")
    out = []
    for place in range(step * batch_size, (step + 1) * batch_size)[part]:
        epoch, index = divmod(place, total)
        out.append(int(_epoch_order(total, seed, epoch)[index]))
    return out


def rows_to_batch(tokens: NDArray[Any], segments: NDArray[Any], mask: NDArray[Any]) -> Batch:
    """Rows of seq_len + 1 as inputs and next-token labels.

    Args:
        tokens, segments, mask: [rows, seq_len + 1].
    Returns:
        Labels are IGNORE across document boundaries, on padding, and where the next token is not supervised; padding is
        marked as such.
    """
    tok = torch.from_numpy(tokens.astype(np.int64))
    seg = torch.from_numpy(segments.astype(np.int64))
    supervised = torch.from_numpy(mask.astype(np.bool_))
    target = (seg[:, 1:] == seg[:, :-1]) & supervised[:, 1:]
    labels = tok[:, 1:].masked_fill(~target, IGNORE)
    doc_ids = seg[:, :-1].contiguous()
    return Batch(tok[:, :-1].contiguous(), labels, doc_ids, real=real_tokens(doc_ids, labels))


class PackedRows:
    """A folder of packed rows, memory-mapped.

    Args:
        seq_len: what the caller expects; rows of another length are refused.
    Raises:
        UserError: a file is missing, cut short or damaged, or rows have another length.
    """

    def __init__(self, folder: Path, seq_len: int | None = None):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.seq_len = self.manifest.seq_len
        if seq_len not in (None, self.seq_len):
            raise UserError(
                f"{folder}: rows hold {self.seq_len} tokens, not the {seq_len} asked for. Run the data_prep stage "
                f"again (--stage data_prep), or use --seq-len {self.seq_len}."
            )
        shards = [[f for f in self.manifest.files if f.field == name] for name in FIELDS]
        self._maps = {name: [self._map(f) for f in files] for name, files in zip(FIELDS, shards, strict=True)}
        self._starts = np.cumsum([0] + [f.rows for f in shards[0]])

    def _map(self, file: ShardFile) -> NDArray[Any]:
        dtype = np.dtype(file.dtype).newbyteorder("<")
        return np.memmap(self.folder / file.name, dtype, mode="r", shape=(file.rows, self.seq_len + 1))

    def __len__(self) -> int:
        return self.manifest.rows

    def _gather(self, name: str, indices: list[int]) -> NDArray[Any]:
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        maps = self._maps[name]
        return np.stack([maps[s][i - self._starts[s]] for s, i in zip(shards, indices, strict=True)])

    def check(self, indices: list[int]) -> None:
        """Raise IndexError unless there are such rows, and one of them at least."""
        if not indices or not all(0 <= i < len(self) for i in indices):
            raise IndexError(f"rows {indices[:8]} of {len(self)} in {self.folder}")

    def fields(self, indices: list[int]) -> list[NDArray[Any]]:
        """Tokens, segments and mask of rows by index, each [len(indices), seq_len + 1].

        Raises:
            IndexError: an index is not within 0..len-1.
        """
        self.check(indices)
        return [self._gather(name, indices) for name in FIELDS]

    def take(self, indices: list[int]) -> Batch:
        """Rows by index, in the given order.

        Raises:
            IndexError: an index is not within 0..len-1.
        """
        return rows_to_batch(*self.fields(indices))

    def batch(self, seed: int, step: int, batch_size: int, part: slice = slice(None)) -> Batch:
        """The rows of one step, or a part of them; no others are read."""
        return self.take(row_order(len(self), seed, step, batch_size, part))

    def slice(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) in stored order."""
        return self.take(list(range(start, min(stop, len(self)))))

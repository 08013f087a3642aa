"""Pairs of a chosen and a rejected answer as packed rows for DPO. Where pairs come from is in `preference_sets`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.files.reading import Tally
from ray_pipeline.data.forms.preference_records import Preference
from ray_pipeline.data.rows.batch import Batch, Extras
from ray_pipeline.data.rows.conversations import Encoded, Encoder, write_split
from ray_pipeline.data.rows.loader import PackedRows, rows_to_batch
from ray_pipeline.data.rows.packing import Row, RowBuilder, best_fit
from ray_pipeline.data.shared.cleaning import content_hash
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import PipelineFields

if TYPE_CHECKING:
    from ray_pipeline.records.progress import Report

# Of a batch's free places; nothing reads them, any token will do.
_PADDING = 0
_CHOSEN, _REJECTED = 0, 1


class PairRows(PackedRows):
    """A folder of pairs: a stored row is a pair, its segments the chosen and the rejected conversation."""

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each stored pair, both conversations together: an index made once, of the segments alone."""
        maps = self._maps["segments"]
        return [int(np.searchsorted(row, _REJECTED, side="right")) for segments in maps for row in segments]

    def rows_of(self, indices: list[int]) -> list[list[int]]:
        """How pairs by index are packed into as few rows as best fit finds: places in `indices`, row by row."""
        self.check(indices)
        return best_fit([self.lengths[index] for index in indices], self.seq_len + 1)

    def take(self, indices: list[int]) -> Batch:
        """Pairs by index as `packed` gives them, in the rows of `rows_of`.

        Raises:
            IndexError: an index is not within 0..len-1.
        """
        return self.packed(indices, self.rows_of(indices))

    def packed(self, indices: list[int], rows: list[list[int]]) -> Batch:
        """Pairs by index in these rows (places in `indices`); both answers of a pair share a row.

        Returns:
            Labels on the tokens of the answers alone. Extras, each [rows, seq_len]: "pair", the place in `indices` of
            the pair that a position belongs to, -1 on padding; "chosen", 1.0 in the chosen conversation, else 0.0.
        """
        pairs = [_split(*fields) for fields in zip(*self.fields(indices), strict=True)]
        made, places = [], []
        for members in rows:
            row = RowBuilder(self.seq_len, _PADDING)
            place = np.tile(np.array([[-1], [0]], np.float32), self.seq_len + 1)  # pair, chosen
            for index in members:
                pair, start = pairs[index], row.used
                for part in (slice(0, pair.chosen), slice(pair.chosen, None)):
                    row.add(pair.tokens[part], pair.mask[part])
                place[0, start : row.used] = index
                place[1, start : start + pair.chosen] = 1
            made.append(row.finish())
            places.append(place)
        batch = rows_to_batch(*(np.stack(field) for field in zip(*made, strict=True)))
        found = torch.from_numpy(np.stack(places))[:, :, :-1]
        batch.extras = Extras(pair=found[:, 0].contiguous(), chosen=found[:, 1].contiguous())
        return batch


class _Pair(NamedTuple):
    """One stored row without its padding: tokens and mask of both conversations, and the length of the chosen one."""

    tokens: NDArray[Any]
    mask: NDArray[Any]
    chosen: int


def _split(tokens: NDArray[Any], segments: NDArray[Any], mask: NDArray[Any]) -> _Pair:
    length = int(np.searchsorted(segments, _REJECTED, side="right"))
    return _Pair(tokens[:length], mask[:length], int(np.searchsorted(segments, _CHOSEN, side="right")))


def write_preferences(
    config: PipelineFields,
    preferences: Sequence[Preference],
    tokenizer: ChatTokenizer,
    folder: Path,
    progress: Report,
    tally: Tally | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Write `folder/train` and `folder/validation`, which PairRows reads.

    Returns:
        The manifest entries, and how many pairs there are and were dropped for not fitting into a row.
    Raises:
        UserError: too few pairs fit, or one cannot be trained with this tokenizer's template.
    """
    data, source = config.data, f"data.preferences={config.data.preferences}"
    chats = [chat for preference in preferences for chat in preference.chats()]
    tally = tally or Tally()
    encoded = Encoder(tokenizer, progress, "preferences", source, tally).whole(chats)
    tally.settle()
    pairs = zip(preferences, encoded[::2], encoded[1::2], strict=True)
    usable = [(pair, (chosen, rejected)) for pair, chosen, rejected in pairs if chosen[0] and rejected[0]]
    preferences, both = [pair for pair, _ in usable], [ids for _, ids in usable]
    lengths = [len(chosen) + len(rejected) for (chosen, _), (rejected, _) in both]
    fitting = [i for i, length in enumerate(lengths) if length <= data.seq_len + 1]
    held = heldout_pairs([preferences[i].question for i in fitting], data.heldout_questions)
    if not any(held):
        shortest = min(lengths, default=0)
        raise UserError(
            f"{source}: {len(fitting)} of {len(lengths)} pairs fit into seq_len={data.seq_len} tokens (the shortest "
            f"has {shortest}), but pairs for at least 2 different prompts must, one to train and one to validate. "
            "Use a larger --seq-len."
        )
    datasets: dict[str, dict[str, Any]] = {}
    counts = {"preference_pairs_too_long": len(lengths) - len(fitting)}
    for name, wanted in (("train", False), ("validation", True)):
        members = [both[i] for i, is_held in zip(fitting, held, strict=True) if is_held == wanted]
        rows = (_row(chosen, rejected, data.seq_len, tokenizer.pad_id) for chosen, rejected in members)
        encoded = [answer for pair in members for answer in pair]
        about = write_split(config, folder / name, rows, encoded, len(tokenizer), data.preferences)
        counts[f"preference_pairs_{name}"] = about["rows"]
        datasets[f"{folder.name}/{name}"] = about
    return datasets, counts


def _row(chosen: Encoded, rejected: Encoded, seq_len: int, pad_id: int) -> Row:
    row = RowBuilder(seq_len, pad_id)
    for ids, mask in (chosen, rejected):
        row.add(np.asarray(ids, np.uint32), np.asarray(mask, np.uint8))
    return row.finish()


def heldout_pairs(questions: Sequence[str], most: int) -> list[bool]:
    """Which pairs are held out: those of the questions with the lowest hashes, at most `most` and a fifth of all.

    Pairs of one question stay together. Of two different questions or more, one goes to either side; none is held out
    of fewer.
    """
    pairs: dict[str, int] = {}
    for question in questions:
        pairs[question] = pairs.get(question, 0) + 1
    held: set[str] = set()
    room = min(most, len(questions) // 5)
    for question in sorted(pairs, key=content_hash)[: len(pairs) - 1]:
        if held and pairs[question] > room:
            break
        held.add(question)
        room -= pairs[question]
    return [question in held for question in questions]

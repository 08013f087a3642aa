"""Conversations as packed rows, split into training and validation by hash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.data.chat.chat import Chat
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.files.fields import BadRecord
from ray_pipeline.data.files.reading import Tally
from ray_pipeline.data.forms.turns import Conversation
from ray_pipeline.data.rows.packing import Row, pack_conversations
from ray_pipeline.data.rows.shards import write_rows
from ray_pipeline.data.shared.cleaning import content_hash, validation_members
from ray_pipeline.data.sources.sources import licence_of
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import PipelineFields

if TYPE_CHECKING:
    from ray_pipeline.records.progress import Report

# Conversations encoded between two progress reports.
CHUNK = 2000
Encoded = tuple[list[int], list[int]]
Encode = Callable[[Sequence[Chat]], list[list[Encoded]]]


@dataclass
class Encoder:
    """Encodes many conversations, and says which of them cannot be.

    Attributes:
        phase: what is reported to `progress`. source: what messages call the conversations.
        tally: may say to omit those that cannot be encoded; they get no sample, and are counted.
    """

    tokenizer: ChatTokenizer
    progress: Report
    phase: str
    source: str
    tally: Tally | None = None

    def whole(self, chats: Sequence[Chat]) -> list[Encoded]:
        """(ids, mask) of every conversation, in order; no ids where it is omitted.

        Raises:
            UserError: the template refuses or spoils one, naming it and the source, or nothing of it would be trained.
        """
        found = self._encode(lambda part: [[encoded] for encoded in self.tokenizer.encode_chats(part)], chats)
        return [parts[0] if parts else ([], []) for parts in found]

    def turns(self, chats: Sequence[Chat]) -> list[list[Encoded]]:
        """The samples of every conversation: one, or one for each answer where the template changes earlier turns; none
        where it is omitted.

        Raises:
            UserError: as `whole`.
        """
        return self._encode(self.tokenizer.encode_turns, chats)

    def _encode(self, encode: Encode, chats: Sequence[Chat]) -> list[list[Encoded]]:
        out: list[list[Encoded]] = []
        for start in range(0, len(chats), CHUNK):
            self.progress(self.phase, start, len(chats))
            chunk = chats[start : start + CHUNK]
            try:
                out += encode(chunk)
            except UserError:
                if self.tally is None or not self.tally.skip:
                    _name_the_first(encode, chunk, start, self.source)
                    raise
                out += _one_by_one(encode, chunk, start, self.tally)
        for number, parts in enumerate(out, start=1):
            if not all(any(mask[1:]) for _, mask in parts):
                raise UserError(
                    f"{self.source}: no token of conversation {number} would be trained, as nothing in it is the "
                    "assistant's. Remove it."
                )
        return out


def _one_by_one(encode: Encode, chats: Sequence[Chat], start: int, tally: Tally) -> list[list[Encoded]]:
    """Encoded conversations; one that cannot be has no sample."""
    out: list[list[Encoded]] = []
    for number, chat in enumerate(chats, start=start + 1):
        try:
            out += encode([chat])
        except UserError as error:
            tally.add_bad(f"conversation {number}", BadRecord(str(error)))
            out.append([])
    return out


def _name_the_first(encode: Encode, chats: Sequence[Chat], start: int, source: str) -> None:
    """Raise UserError for the first conversation that cannot be encoded, telling which it is."""
    for number, chat in enumerate(chats, start=start + 1):
        try:
            encode([chat])
        except UserError as error:
            asked = next(str(m["content"]) for m in chat.messages if m["role"] == "user")
            raise UserError(f'{source}: conversation {number} ("{asked:.40}"): {error}') from None


def write_conversations(
    config: PipelineFields,
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    folder: Path,
    progress: Report,
    tally: Tally | None = None,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Pack into `folder/train` and `folder/validation`.

    Returns:
        The manifest entries, and how many conversations were dropped for not fitting into a row.
    Raises:
        UserError: too few conversations fit, or one cannot be trained with this tokenizer's template.
    """
    seq_len, source = config.data.seq_len, f"--sft-data {config.data.sft}"
    chats = [conversation.chat() for conversation in conversations]
    samples = Encoder(tokenizer, progress, "conversations", source, tally).turns(chats)
    if tally is not None:
        tally.settle()
    # Samples of one conversation have one digest, and so go to the same side.
    digests = [content_hash(c.text) for c, parts in zip(conversations, samples, strict=True) for _ in parts]
    encoded = [part for parts in samples for part in parts]
    fitting = [i for i, (ids, _) in enumerate(encoded) if len(ids) <= seq_len + 1]
    if len(fitting) < 2:
        shortest = min((len(ids) for ids, _ in encoded), default=0)
        raise UserError(
            f"{source}: {len(fitting)} of {len(encoded)} conversations fit into seq_len={seq_len} "
            f"tokens (the shortest has {shortest}), but at least 2 must. Use a larger --seq-len."
        )
    held = validation_members([digests[i] for i in fitting], config.data.validation_fraction)
    datasets = {}
    for name, wanted in (("train", False), ("validation", True)):
        members = [encoded[i] for i, is_held in zip(fitting, held, strict=True) if is_held == wanted]
        rows, _ = pack_conversations(members, seq_len, tokenizer.pad_id)
        about = write_split(config, folder / name, rows, members, len(tokenizer), config.data.sft)
        datasets[f"{folder.name}/{name}"] = about
    return datasets, sum(len(ids) > seq_len + 1 for ids, _ in encoded)


def write_split(
    config: PipelineFields, folder: Path, rows: Iterable[Row], encoded: Sequence[Encoded], entries: int, source: str
) -> dict[str, Any]:
    """Write rows into `folder`; the manifest's entry of them.

    Args:
        encoded: the conversations in the rows. entries: of the vocabulary. source: where they are from.
    """
    data = config.data
    written = write_rows(folder, rows, seq_len=data.seq_len, vocab_size=entries, tokens_per_shard=data.tokens_per_shard)
    return {
        "rows": written.rows,
        "tokens": sum(len(ids) for ids, _ in encoded),
        "targets": written.targets,
        "documents": len(encoded),
        "sources": [{"name": source, "licence": licence_of(source), "documents": len(encoded)}],
    }

"""Conversations as packed rows, split into training and validation by hash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.data.chat.chat import Chat
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.files.fields import BadRecord
from ray_pipeline.data.files.reading import LOOKED_ON, Tally
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
        tally: counts those that cannot be encoded; it may say to omit them, and then they get no sample.
    """

    tokenizer: ChatTokenizer
    progress: Report
    phase: str
    source: str
    tally: Tally = field(default_factory=Tally)

    def whole(self, chats: Sequence[Chat]) -> list[Encoded]:
        """(ids, mask) of every conversation, in order; no ids where it is omitted.

        Raises:
            UserError: the template refuses or spoils some, or nothing of them would be trained: all of them, by kind.
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
        self.tally.records = self.tally.records or len(chats)
        ends_at = len(chats)
        for start in range(0, len(chats), CHUNK):
            if start >= ends_at:
                break
            self.progress(self.phase, start, len(chats))
            out += self._chunk(encode, chats[start : start + CHUNK], start)
            if self.tally.num_bad and not self.tally.skip:
                ends_at = min(ends_at, start + LOOKED_ON)
        if not self.tally.skip:
            try:
                self.tally.settle()
            except UserError as error:
                raise UserError(f"{self.source}: {error}") from None
        return out

    def _chunk(self, encode: Encode, chats: Sequence[Chat], start: int) -> list[list[Encoded]]:
        """The samples of some conversations; those that cannot be encoded are counted and have none."""
        try:
            found: list[list[Encoded] | UserError] = list(encode(chats))
        except UserError:
            found = [_alone(encode, chat) for chat in chats]
        out: list[list[Encoded]] = []
        for number, (chat, parts) in enumerate(zip(chats, found, strict=True), start=start + 1):
            if isinstance(parts, UserError):
                reason = str(parts)
            elif not all(any(mask[1:]) for _, mask in parts):
                reason = "no token of it would be trained, as nothing in it is the assistant's"
            else:
                out.append(parts)
                continue
            asked = next((str(m["content"]) for m in chat.messages if m["role"] == "user"), "")
            self.tally.add_bad(f'conversation {number} ("{asked:.40}")', BadRecord(reason))
            out.append([])
        return out


def _alone(encode: Encode, chat: Chat) -> list[Encoded] | UserError:
    """The samples of one conversation, or why it has none."""
    try:
        return encode([chat])[0]
    except UserError as error:
        return error


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
    tally = tally or Tally()
    samples = Encoder(tokenizer, progress, "conversations", source, tally).turns(chats)
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

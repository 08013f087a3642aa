"""Conversations as packed rows, split into training and validation by hash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.config import PipelineFields
from ray_pipeline.data.cleaning import content_hash, validation_members
from ray_pipeline.data.packing import pack_conversations
from ray_pipeline.data.records import Conversation
from ray_pipeline.data.shards import write_rows
from ray_pipeline.data.sources import BUILTIN
from ray_pipeline.data.tokenizer import ChatTokenizer
from ray_pipeline.errors import UserError

if TYPE_CHECKING:
    from ray_pipeline.data.ray_prepare import Progress

# Conversations encoded between two progress reports.
CHUNK = 2000
Encoded = tuple[list[int], list[int]]


def encode_all(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], progress: Progress, phase: str = "conversations"
) -> list[Encoded]:
    """(ids, mask) of every conversation, in order."""
    out: list[Encoded] = []
    for start in range(0, len(conversations), CHUNK):
        progress(phase, start, len(conversations))
        out += tokenizer.encode_chats([c.messages for c in conversations[start : start + CHUNK]])
    return out


def write_conversations(
    config: PipelineFields,
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Pack into `folder/train` and `folder/validation`.

    Returns:
        The manifest entries, and how many conversations were dropped for not fitting into a row.
    Raises:
        UserError: too few conversations fit.
    """
    seq_len = config.data.seq_len
    digests = [content_hash("\n".join(m["content"] for m in c.messages)) for c in conversations]
    encoded = encode_all(tokenizer, conversations, progress)
    fitting = [i for i, (ids, _) in enumerate(encoded) if len(ids) <= seq_len + 1]
    if len(fitting) < 2:
        shortest = min(len(ids) for ids, _ in encoded)
        raise UserError(
            f"--sft-data {config.data.sft}: {len(fitting)} of {len(encoded)} conversations fit into seq_len={seq_len} "
            f"tokens (the shortest has {shortest}), but at least 2 must. Use a larger --seq-len."
        )
    held = validation_members([digests[i] for i in fitting], config.data.validation_fraction)
    datasets = {}
    for name, wanted in (("train", False), ("validation", True)):
        members = [encoded[i] for i, is_held in zip(fitting, held, strict=True) if is_held == wanted]
        rows, _ = pack_conversations(members, seq_len, tokenizer.pad_id)
        written = write_rows(
            folder / name,
            rows,
            seq_len=seq_len,
            vocab_size=len(tokenizer),
            tokens_per_shard=config.data.tokens_per_shard,
        )
        datasets[f"{folder.name}/{name}"] = {
            "rows": written.rows,
            "tokens": sum(len(ids) for ids, _ in members),
            "targets": written.targets,
            "documents": len(members),
            "sources": [{"name": config.data.sft, "licence": licence_of(config.data.sft), "documents": len(members)}],
        }
    return datasets, len(encoded) - len(fitting)


def licence_of(source: str) -> str:
    """Licence of a source the config has no field for."""
    return "Apache-2.0" if source == BUILTIN else "unknown"

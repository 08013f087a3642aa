"""What a turn, or a record, holds beside its role and text: parts, reasoning, whether it is trained, media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_pipeline.data.files.fields import BadRecord, Record, shown
from ray_pipeline.data.tasks.question import THINK_OPEN, think

# Names of what an assistant thought before it answered: DeepSeek's API, OpenRouter's and Ollama's.
REASONING = ("reasoning_content", "reasoning", "thinking")
# OpenAI's name, then Axolotl's two and ms-swift's, of whether an assistant's turn is learned from.
FLAGS = ("weight", "train", "training", "loss")
# Axolotl's spans of characters with a flag each.
_SPANS = ("train_detail", "training_detail")
MEDIA = ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Kind of a part -> the field with its text.
_THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}


def refuse_media(record: Record, place: str = "") -> None:
    """Raise BadRecord where a turn, or a record, holds images, sound or film: only text is learned."""
    for name in MEDIA:
        if record.get(name):
            raise BadRecord(
                f'{place or "the record"} has "{name}", but this model reads text alone: what stands for it in the '
                "text would be learned as letters"
            )


def is_trained(turn: Record, role: str, place: str) -> bool:
    """Whether the turn's tokens are learned from; only an assistant's ever are.

    Raises:
        BadRecord: a share between yes and no, flags that disagree, or a turn of somebody else that is to be trained.
    """
    given = {name: turn.get(name) for name in FLAGS if turn.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRecord(
                f'{place} has "{name}": {shown(value)}, but a turn is learned from (1 or true) or not (0 or false)'
            )
    if len(set(map(bool, given.values()))) > 1:
        raise BadRecord(f"{place} is to be trained and not to be trained: {shown(given)}")
    if any(turn.get(name) for name in _SPANS):
        raise BadRecord(f'{place} has "{_SPANS[0]}", but a turn is learned from whole or not at all')
    if role != "assistant" and (given.get("train") or given.get("training")):
        raise BadRecord(f"{place} is to be trained, but only the assistant's turns are learned from")
    return all(given.values())


def content_text(content: object, place: str) -> tuple[str, str]:
    """(text, reasoning) of a content: text, nothing, or a list of parts as OpenAI's and Anthropic's APIs have them.

    Raises:
        BadRecord: a part that is no text, by its kind.
    """
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, Sequence) or not content:
        raise BadRecord(f"{place} that is text, not {shown(content)}")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in (*_TEXT_PARTS, *_THOUGHT_PARTS):
            kind = shown(kind)
            raise BadRecord(f'{place} of text, but it has a part of the kind "{kind}", which this model cannot read')
        value = part.get(_THOUGHT_PARTS.get(kind, "text")) if isinstance(part, Mapping) else part
        if not isinstance(value, str):
            raise BadRecord(f"{place} of text, but it has the part {shown(part)}")
        (thoughts if kind in _THOUGHT_PARTS else texts).append(value)
    return "\n".join(texts), "\n".join(thoughts)


def reasoning_of(record: Record, place: str) -> str:
    """What was thought before the answer, from the first of REASONING that is filled; else the empty string."""
    for name in REASONING:
        value = record.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise BadRecord(f'{place} has "{name}", which must be text, but is {shown(value)}')
        if value.strip():
            return value.strip()
    return ""


def with_reasoning(reasoning: str, answer: str, place: str) -> str:
    """The answer with its reasoning in think tags before it.

    Raises:
        BadRecord: the answer holds other reasoning already.
    """
    if not reasoning or (THINK_OPEN in answer and reasoning in answer):
        return answer
    if THINK_OPEN in answer:
        raise BadRecord(f"{place} has reasoning of its own and another between {THINK_OPEN} and </think> in its text")
    return think(reasoning, answer)

"""Multiple choice, as in MMLU (arXiv:2009.03300): by the likelihood of each option, or by what the model writes."""

from __future__ import annotations

import string
from typing import Any

from ray_pipeline.data.files.fields import BadRecord, Record
from ray_pipeline.evaluation.graders import AnswerScoring
from ray_pipeline.evaluation.tasks.catalog import task
from ray_pipeline.evaluation.tasks.item import Item, Request, Task
from ray_pipeline.evaluation.tasks.record_tasks import level, read_items, text_field

MMLU = "cais/mmlu:test"
LETTERS = string.ascii_uppercase


def _options(record: Record) -> list[str]:
    """The texts of the choices: a list, or ARC's {"text": [...], "label": [...]}."""
    for name in ("choices", "options"):
        value = record.get(name)
        if isinstance(value, dict):
            value = value.get("text")
        if value is not None:
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise BadRecord(f'field "{name}" must be a list of texts, but is {value!r:.60}')
            if not 2 <= len(value) <= len(LETTERS):
                raise BadRecord(f'field "{name}" has {len(value)} choices: give 2 to {len(LETTERS)}')
            return value
    raise BadRecord(f'needs a field "choices", but has {", ".join(map(repr, record)) or "none"}')


def _right(record: Record, options: list[str]) -> int:
    """Index of the right choice, given as an index from 0, a letter, ARC's label, or the text itself."""
    value: Any = record.get("answer", record.get("answerKey"))
    labels = record["choices"].get("label") if isinstance(record.get("choices"), dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return value
    if isinstance(value, str):
        if isinstance(labels, list) and value in labels:
            return labels.index(value)
        if len(value) == 1 and value.upper() in LETTERS[: len(options)]:
            return LETTERS.index(value.upper())
        if value in options:
            return options.index(value)
    last = LETTERS[len(options) - 1]
    raise BadRecord(
        f'field "answer" is {value!r:.60}: must be an index from 0 to {len(options) - 1}, a letter from A to {last}, '
        "or one of the choices"
    )


def _choice(record: Record, index: int, *, listed: bool) -> Item:
    question, options = text_field(record, "question", "prompt"), _options(record)
    right = _right(record, options)
    named = record.get("subject", record.get("category"))
    category = named if isinstance(named, str) else ""
    difficulty = level(record.get("difficulty"))
    if not listed:
        return Item(str(index), question, options[right], category, difficulty, options=tuple(options))
    letters = tuple(LETTERS[: len(options)])
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, options, strict=True))
    prompt = f"{question}\n{lines}\nAnswer with the letter alone."
    return Item(str(index), prompt, letters[right], category, difficulty, options=letters)


def _read(name: str, request: Request, *, listed: bool) -> list[Item]:
    return read_items(name, request.argument or MMLU, lambda record, i: _choice(record, i, listed=listed))


@task("choices", takes="PATH")
def choices(request: Request) -> Task:
    """Multiple choice: the options are listed and the likeliest letter counts (without a path: MMLU)."""
    return Task("choices", _read("choices", request, listed=True), way="options")


@task("cloze", takes="PATH")
def cloze(request: Request) -> Task:
    """Multiple choice: the likeliest option text counts, per byte, and none is listed."""
    return Task("cloze", _read("cloze", request, listed=False), way="options")


@task("choices_written", takes="PATH")
def choices_written(request: Request) -> Task:
    """Multiple choice: the model thinks and writes the letter."""
    return Task("choices_written", _read("choices_written", request, listed=True), AnswerScoring())

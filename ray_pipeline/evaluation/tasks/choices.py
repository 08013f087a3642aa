"""Multiple choice, as in MMLU (arXiv:2009.03300): by the likelihood of each option, or by what the model writes."""

from __future__ import annotations

import string

from ray_pipeline.data.files.fields import BadRecord, Record, names
from ray_pipeline.data.forms.question_records import answer_of, choices_of
from ray_pipeline.evaluation.graders import AnswerScoring
from ray_pipeline.evaluation.tasks.catalog import task
from ray_pipeline.evaluation.tasks.item import Item, Request, Task
from ray_pipeline.evaluation.tasks.record_tasks import level, read_items, text_field

MMLU = "cais/mmlu:test"
LETTERS = string.ascii_uppercase


def _choice(record: Record, index: int, *, listed: bool) -> Item:
    question, choices = text_field(record, "question", "prompt"), choices_of(record)
    if not choices:
        raise BadRecord(f'needs a field "choices", but has {names(record)}')
    if not 2 <= len(choices) <= len(LETTERS):
        raise BadRecord(f"the question has {len(choices)} choices: give 2 to {len(LETTERS)}")
    options = tuple(choices.values())
    right = list(choices).index(answer_of(record)[1])
    named = record.get("subject", record.get("category"))
    category = named if isinstance(named, str) else ""
    difficulty = level(record.get("difficulty"))
    if not listed:
        return Item(str(index), question, options[right], category, difficulty, options=options)
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

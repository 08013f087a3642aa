"""Records of questions with one answer: GSM8K, MATH, multiple choice, verl, and DATA_PREP's own; and
a question as a conversation with a tool. No files here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ray_pipeline.data.files.fields import BadRecord, Record, filled, glance, names, nearest_field, optional_text, shown
from ray_pipeline.data.forms.turn_fields import refuse_media
from ray_pipeline.data.forms.turns import Conversation, read_turns
from ray_pipeline.data.tasks.question import Question, think

_ANNOTATION = re.compile(r"<<[^<>]*>>")
# GSM8K's last line: "#### 72", thousands with commas (arXiv:2110.14168).
_FINAL = re.compile(r"^####[ \t]*(.+?)[ \t]*$", re.MULTILINE)
QUESTION = ("question", "problem", "prompt", "query")
# What a question is about, written before it: SVAMP's and ASDiv's body, SQuAD's context, BoolQ's passage.
BEFORE = ("body", "context", "passage")
CHOICES = ("choices", "options")
SYSTEM = ("system", "system_prompt")
# The tool and its argument, as ray_pipeline.tools has them.
CALCULATOR, ARGUMENT = "calculator", "expression"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def as_question(record: Record, category: str) -> Question:
    """A question with its exact answer, for GRPO and evaluation.

    Args:
        category: used where the record names none.
    Raises:
        BadRecord: no question, no answer, or something that belongs to the question and cannot be asked.
    """
    field = next((name for name in QUESTION if name in record), None)
    answered = any(name in record for name in ("answer", "solution", "answerKey", "reward_model"))
    if field is None or not answered:
        hint = nearest_field(record, (*QUESTION, "answer", "solution"))
        raise BadRecord(f'needs "question" and "answer", but has {names(record)}{hint}')
    refuse_media(record)
    for name in SYSTEM:
        if optional_text(record, name).strip():
            raise BadRecord(f'has "{name}", but questions are asked without a system message; put it into the question')
    if record.get("answer") is None and "solution" in record and not _marks_answer(filled(record, "solution")):
        raise BadRecord('"solution" marks no final answer by \\boxed{} or ####; give it as "answer"')
    prompt = question_text(record, field)
    steps, final = answer_of(record)
    difficulty = record.get("difficulty")
    if not isinstance(difficulty, int):
        difficulty = min(5, steps.count("\n") + 1) if steps else 0  # a line of working is a step
    named = record.get("category")
    if isinstance(named, str):
        category = named
    return Question(prompt, steps, final, category, difficulty)


def question_text(record: Record, field: str) -> str:
    """The question, what it is about before it, and its choices after it, a line each.

    Raises:
        BadRecord: the question is empty, is a conversation of several turns, or a part of it is no text.
    """
    asked = _one_turn(record, field) if isinstance(record[field], list) else filled(record, field).strip()
    before = [optional_text(record, name).strip() for name in BEFORE if name != field]
    choices = [f"{label}. {text}" for label, text in choices_of(record).items()]
    return "\n".join(part for part in (*before, asked, *choices) if part)


def _one_turn(record: Record, field: str) -> str:
    """The text of a prompt that is a list of one user's turn, as verl writes it."""
    turns = read_turns(record[field], field)
    if [turn["role"] for turn in turns] != ["user"] or not turns[0]["content"].strip():
        roles = [turn["role"] for turn in turns]
        raise BadRecord(f'"{field}" must be one user turn with a question in it, but has {shown(roles)}')
    return str(turns[0]["content"]).strip()


def choices_of(record: Record) -> dict[str, str]:
    """Label -> text of a multiple choice question, in order; empty where there is nothing to choose from.

    Lists get letters as labels (MMLU); {"label", "text"} (ARC) and {label: text} (MedQA) have their own.
    """
    field = next((name for name in CHOICES if glance(record, name)), None)
    if field is None:
        return {}
    given = record[field]
    if isinstance(given, Mapping) and {"label", "text"} <= set(given):
        labels, texts = given["label"], given["text"]
    elif isinstance(given, Mapping):
        labels, texts = list(given), [given[label] for label in given]
    else:
        texts = given
        labels = list(_LETTERS[: len(given)]) if isinstance(given, Sequence) else []
    lists = isinstance(labels, Sequence) and isinstance(texts, Sequence) and not isinstance(texts, str)
    if not lists or len(labels) != len(texts) or not all(isinstance(part, str) for part in (*labels, *texts)):
        raise BadRecord(f'"{field}" must be texts, or a "text" and a "label" of each, but is {shown(given)}')
    return {label.strip(): text.strip() for label, text in zip(labels, texts, strict=True)}


def answer_of(record: Record) -> tuple[str, str]:
    """(worked steps, final answer) of a record's answer; of multiple choice the label of the right one.

    Raises:
        BadRecord: it is empty, no text, or none of the choices.
    """
    if record.get("answer") is not None:
        steps, final = split_answer(filled(record, "answer"))
        steps = steps or optional_text(record, "solution").strip()
    elif record.get("solution") is not None:
        solution = filled(record, "solution").strip()
        inside = boxed(solution)
        steps, final = split_answer(solution) if inside is None else (solution, inside.strip())
    elif isinstance(record.get("reward_model"), Mapping):
        steps, final = "", filled(record["reward_model"], "ground_truth").strip()
    else:
        field = "answerKey" if "answerKey" in record else "answer"
        steps, final = "", filled(record, field).strip()
    choices = choices_of(record)
    return (steps, _chosen(choices, final, record.get("answer"))) if choices else (steps, final)


def _chosen(choices: Mapping[str, str], final: str, given: object) -> str:
    """The label of the right choice, which is given by its label, its text, or its place from 0 (MMLU)."""
    labels = list(choices)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(labels):
        return labels[given]
    if final in choices:
        return final
    for label, text in choices.items():
        if text == final:
            return label
    if final.upper() in choices:
        return final.upper()
    raise BadRecord(f"the answer {shown(final)} is none of the choices {shown(labels)}, nor their texts or places")


def split_answer(answer: str) -> tuple[str, str]:
    """A worked solution as (steps, final answer): the final one stands behind "####"; without that, all of it is final.

    Calculator annotations `<<48/2=24>>` are removed.
    """
    text = _ANNOTATION.sub("", answer).strip()
    finals = list(_FINAL.finditer(text))
    if not finals:
        return "", text
    return text[: finals[-1].start()].strip(), finals[-1][1]


def _marks_answer(solution: str) -> bool:
    return boxed(solution) is not None or _FINAL.search(solution) is not None


def boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, braces balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i]
    return None


def tool_conversation(question: Question) -> Conversation:
    """The question, one call of the calculator, what it gives, and the answer."""
    expression = question.steps.partition("=")[0]
    call = {"type": "function", "function": {"name": CALCULATOR, "arguments": {ARGUMENT: expression}}}
    return Conversation(
        (
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": question.answer},
            {"role": "assistant", "content": think(f"The calculator gives {question.answer}.", question.answer)},
        )
    )

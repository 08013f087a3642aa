"""Questions with a written answer: a run's held-out ones, GSM8K, MATH-500, reasoning-gym, any file of the same form."""

from __future__ import annotations

from pathlib import Path

from ray_pipeline.data.files.fields import Record
from ray_pipeline.data.forms.question_records import as_question
from ray_pipeline.data.tasks.question import prepared_questions
from ray_pipeline.data.tasks.reasoning_gym_source import entry_text, gym_entries
from ray_pipeline.data.tasks.small_talk import unseen_questions
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.graders import AnswerScoring, RewardScoring
from ray_pipeline.evaluation.tasks.catalog import task
from ray_pipeline.evaluation.tasks.item import Item, Request, Task
from ray_pipeline.evaluation.tasks.record_tasks import level, read_items, text_field

GSM8K, MATH500 = "openai/gsm8k:test", "HuggingFaceH4/MATH-500:test"
GYM_QUESTIONS = 100  # of a task of reasoning-gym, where no limit is given
SMALL_TALK_QUESTIONS = 100
BOXED = "\nPut the final answer within \\boxed{}."


def _questions(name: str, given: str) -> list[Item]:
    def convert(record: Record, index: int) -> Item:
        found = as_question(record, name)
        return Item(str(index), found.prompt, found.answer, found.category, found.difficulty)

    return read_items(name, given, convert)


@task("heldout", takes="PATH")
def heldout(request: Request) -> Task:
    """The run's own held-out questions, or another file like them."""
    if request.argument is not None:
        return Task("heldout", _questions("heldout", request.argument), AnswerScoring())
    if request.heldout is None:
        raise UserError(
            "--tasks heldout: the model is not of a run, so it has no questions of its own. Name a run, or give "
            "a file: heldout:runs/NAME/data_prep-ID/prompts/heldout.jsonl."
        )
    return run_questions(request.heldout)


def run_questions(path: Path, limit: int | None = None) -> Task:
    """The questions that a run's DATA_PREP held out, at most `limit` of them.

    Raises:
        UserError: the file is missing or damaged.
    """
    items = [
        Item(str(i), q["prompt"], str(q["answer"]), str(q.get("category", "")), int(q.get("difficulty", 0)))
        for i, q in enumerate(prepared_questions(path, limit))
    ]
    return Task("heldout", items, AnswerScoring())


@task("questions", takes="PATH")
def questions(request: Request) -> Task:
    """Any file or hub dataset with question and answer; the final answer counts."""
    if request.argument is None:
        raise UserError("--tasks questions: name the file, for example questions:my/questions.jsonl.")
    return Task("questions", _questions("questions", request.argument), AnswerScoring())


@task("small_talk")
def small_talk(request: Request) -> Task:
    """Questions that a model trained on builtin_chat was not trained for: it is right where it says so."""
    asked = unseen_questions(request.limit or SMALL_TALK_QUESTIONS, request.seed)
    items = [Item(str(i), prompt, answer, "small_talk") for i, (prompt, answer) in enumerate(asked)]
    return Task("small_talk", items, RewardScoring("exact"))


@task("gsm8k", takes="PATH")
def gsm8k(request: Request) -> Task:
    """GSM8K (arXiv:2110.14168): school mathematics in words. Difficulty counts the steps of the solution."""
    return Task("gsm8k", _questions("gsm8k", request.argument or GSM8K), AnswerScoring())


@task("math500", takes="PATH")
def math500(request: Request) -> Task:
    """MATH-500 (arXiv:2305.20050): competition mathematics, marked by math-verify."""

    def convert(record: Record, index: int) -> Item:
        problem, answer = text_field(record, "problem", "question"), text_field(record, "answer")
        subject = record.get("subject")
        category = subject if isinstance(subject, str) else "math500"
        return Item(str(record.get("unique_id", index)), problem + BOXED, answer, category, level(record.get("level")))

    return Task("math500", read_items("math500", request.argument or MATH500, convert), RewardScoring("math"))


@task("reasoning_gym", takes="TASK")
def reasoning_gym(request: Request) -> Task:
    """A task of reasoning-gym by name, such as reasoning_gym:countdown."""
    name = request.argument
    if name is None:
        raise UserError("--tasks reasoning_gym: name one of its tasks, for example reasoning_gym:countdown.")
    try:
        entries = gym_entries(name, request.limit or GYM_QUESTIONS, request.seed)
    except UserError as error:
        raise UserError(f"--tasks {error}") from None
    # The verifier reads the whole entry, as a JSON text; people read its answer.
    items = [
        Item(str(i), str(e["question"]), str(e["answer"]), name, data={"reference": entry_text(e)})
        for i, e in enumerate(entries)
    ]
    return Task("reasoning_gym", items, RewardScoring(f"reasoning_gym:{name}"))

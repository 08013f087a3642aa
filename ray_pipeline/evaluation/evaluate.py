"""Asks a model the questions of a task and marks what it says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ray_pipeline.evaluation.asking import AskSettings, Watch, ask
from ray_pipeline.evaluation.models import LanguageModel
from ray_pipeline.evaluation.results import ItemResult, Sample, TaskResult
from ray_pipeline.evaluation.tasks.item import Item, Task
from ray_pipeline.rollouts.rollout import RIGHT

OPTION_BATCH = 64  # questions whose options are scored between two reports of progress


def answers_wanted(task: Task, settings: AskSettings) -> int:
    """How many answers of the model the task takes, for a progress bar; 0 where only it knows."""
    if task.way == "harness":
        return 0
    return len(task.items) * (settings.samples if task.way == "answers" else 1)


def evaluate(
    model: LanguageModel, task: Task, settings: AskSettings, ks: tuple[int, ...] = (1,), watch: Watch = lambda *_: None
) -> TaskResult:
    """A task's marked answers.

    Args:
        ks: the k of pass@k and maj@k, none above `settings.samples`.
    Raises:
        UserError: the marking fails too often, or a harness refuses.
    """
    started = time.perf_counter()
    if task.way == "harness":
        return task.harness.run(model, settings, watch)
    if task.way == "options":
        answers = [[answer] for answer in choose_options(model, task, watch)]
        return TaskResult(task.name, task.way, _results(task.items, answers), time.perf_counter() - started)
    samples = ask(model, task.items, settings, watch)
    seconds = time.perf_counter() - started
    return TaskResult(task.name, task.way, _results(task.items, mark(task, samples)), seconds, ks, task.votes)


def _results(items: Sequence[Item], answers: Sequence[list[Sample]]) -> list[ItemResult]:
    return [
        ItemResult(item.id, item.prompt, item.reference, item.category, item.difficulty, marked)
        for item, marked in zip(items, answers, strict=True)
    ]


def mark(task: Task, samples: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """The answers to each of the task's questions with their marks."""
    assert task.scoring is not None
    flat = [(item, sample) for item, answers in zip(task.items, samples, strict=True) for sample in answers]
    with task.scoring as scoring:
        scores = scoring.score([item for item, _ in flat], [sample.completion for _, sample in flat])
    marked = iter(
        replace(sample, score=score, correct=sample.fits and score is not None and score >= RIGHT)
        for (_, sample), score in zip(flat, scores, strict=True)
    )
    return [[next(marked) for _ in answers] for answers in samples]


def choose_options(model: LanguageModel, task: Task, watch: Watch = lambda *_: None) -> list[Sample]:
    """The likeliest option of each question, by log-probability per byte; the first of equally likely ones.

    Listed letters are one byte each, so for them it is the plain log-probability.
    """
    out = []
    for at in range(0, len(task.items), OPTION_BATCH):
        items = task.items[at : at + OPTION_BATCH]
        logprobs = iter(model.logprobs([model.answered(item.prompt, o) for item in items for o in item.options]))
        for item in items:
            values = [next(logprobs)[0] / len(option.encode()) for option in item.options]
            chosen = item.options[max(range(len(values)), key=lambda i: (values[i], -i))]
            right = chosen == item.reference
            out.append(Sample(chosen, right, float(right)))
        watch(len(items), 0)
    return out

"""Marks answers: are they right, and are they in the form that was asked for. Used in training and by `eval`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from ray_pipeline.rewards import gym
from ray_pipeline.rewards.answer import answer, as_text, extract, final_text, parse_number, stated_number
from ray_pipeline.rewards.think_format import think_format
from ray_pipeline.rollouts.rollout import RIGHT
from ray_pipeline.settings.post_training import ScoringConfig


def are_right(answers: Sequence[tuple[str, str, str]]) -> list[bool]:
    """Of (prompt, text, reference) each: whether the final answer equals the reference's.

    Where the reference is an entry of reasoning-gym, its task's own verifier says so, in a process of its own with a
    time limit: it reads what a model wrote. What it cannot read is not right.
    """
    right, by_task = [False] * len(answers), defaultdict(list)
    for i, (prompt, text, reference) in enumerate(answers):
        task = gym.task_of(reference)
        if task is None:
            right[i] = answer(prompt, text, reference) == RIGHT
        else:
            by_task[task].append(i)
    for task, places in by_task.items():
        for i, verdict in zip(places, _verified(task, [answers[i] for i in places]), strict=True):
            right[i] = verdict
    return right


def _verified(task: str, answers: Sequence[tuple[str, str, str]]) -> list[bool]:
    from ray_pipeline.rewards.scoring import Scorer

    name = f"reasoning_gym:{task}"
    with Scorer({name: 1.0}, ScoringConfig(max_failures=1.0)) as scorer:
        scores = scorer.score(answers)
    return [not failed and part[name] == RIGHT for part, failed in zip(scores.parts, scores.failed, strict=True)]


def is_well_formed(text: str) -> bool:
    """Whether the text is one thinking block with an answer behind it."""
    return think_format("", text, "") == RIGHT


def vote(text: str, reference: str) -> Hashable | None:
    """What an answer votes for in a majority: its number where the reference is one, else its text without case.

    Returns:
        None where nothing is answered.
    """
    final = final_text(text)
    if final is None or not final.strip():
        return None
    given = extract(final)
    is_number = gym.task_of(reference) is None and parse_number(extract(reference)) is not None
    return stated_number(given) if is_number else as_text(given) or None

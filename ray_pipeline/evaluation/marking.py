"""Marks one answer: is it right, and is it in the form that was asked for. Used in training and by `eval`."""

from __future__ import annotations

from collections.abc import Hashable

from ray_pipeline.rewards.answer import answer, as_text, extract, final_text, parse_number, stated_number
from ray_pipeline.rewards.think_format import think_format

RIGHT = 1.0


def is_right(prompt: str, text: str, reference: str) -> bool:
    """Whether the final answer equals the reference's."""
    return answer(prompt, text, reference) == RIGHT


def is_well_formed(prompt: str, text: str, reference: str) -> bool:
    """Whether the text is one thinking block with an answer behind it."""
    return think_format(prompt, text, reference) == RIGHT


def vote(text: str, reference: str) -> Hashable | None:
    """What an answer votes for in a majority: its number where the reference is one, else its text without case.

    Returns:
        None where nothing is answered.
    """
    final = final_text(text)
    if final is None or not final.strip():
        return None
    given = extract(final)
    return as_text(given) or None if parse_number(extract(reference)) is None else stated_number(given)

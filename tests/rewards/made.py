"""Rewards that tests name in a config."""

from __future__ import annotations

import time

from ray_pipeline.rewards.registry import reward


def brevity(prompt: str, completion: str, reference: str) -> float:
    return -len(completion) / 100


def knows(prompt: str, completion: str, reference: str) -> float:
    return float(completion.endswith(f"</think>{reference}"))


def prefers_wrong(prompt: str, completion: str, reference: str) -> float:
    return float(not completion.endswith(f"</think>{reference}"))


def sometimes(prompt: str, completion: str, reference: str) -> float:
    """What the completion asks for."""
    if "raise" in completion:
        raise RuntimeError("asked to raise")
    if "hang" in completion:
        time.sleep(60)
    if "nothing" in completion:
        return None  # type: ignore[return-value]
    if "infinite" in completion:
        return float("inf")
    return len(completion) / 10


@reward("shouts")
def shouts(prompt: str, completion: str, reference: str) -> float:
    return float(completion.isupper())


@reward("overconfident", isolated=False)
def overconfident(prompt: str, completion: str, reference: str) -> float:
    return 1 / len(completion)


@reward("forgiving", judges=True, isolated=False)
def forgiving(prompt: str, completion: str, reference: str) -> float:
    return 1.0

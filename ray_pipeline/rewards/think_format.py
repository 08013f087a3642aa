"""Did the model answer as `<think>…</think>answer`? (DeepSeek-R1, arXiv:2501.12948, §2.2.2.) Never raises."""

from __future__ import annotations

from ray_pipeline.rewards.answer import CLOSE, OPEN


def think_format(prompt: str, completion: str, reference: str) -> float:
    """1.0 for exactly one thinking block, at the start, and a non-empty answer behind it; else 0.0.

    Args:
        completion: what the model wrote. prompt and reference are not looked at.
    """
    del prompt, reference
    text = completion.strip()
    once = text.count(OPEN) == 1 and text.count(CLOSE) == 1 and text.startswith(OPEN)
    return float(once and bool(text.partition(CLOSE)[2].strip()))

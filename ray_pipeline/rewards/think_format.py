"""Did the model answer as `<think>…</think>answer`? (DeepSeek-R1, arXiv:2501.12948, §2.2.2.) Never raises."""

from __future__ import annotations

from ray_pipeline.reasoning import parse
from ray_pipeline.rewards.registry import reward
from ray_pipeline.tools.calls import own_words


@reward("format", isolated=False, full=1.0)
def think_format(prompt: str, completion: str, reference: str) -> float:
    """1.0 for exactly one thinking block, at the start, and a non-empty answer behind it; else 0.0.

    Args:
        completion: what the model wrote; calls of tools may stand anywhere. prompt and reference are not looked at.
    """
    del prompt, reference
    reasoned = parse(own_words(completion))
    once = reasoned.opened == reasoned.closed == 1 and not reasoned.before.strip() and not reasoned.unclosed
    return float(once and bool((reasoned.answer or "").strip()))

"""Shorter answers score more (Kimi k1.5, arXiv:2501.12599, §2.3.3). Never raises.

Kimi compares lengths within a group of answers. So does GRPO when it subtracts the group's mean, which leaves this
function only to fall with length; as it falls by a share and not by a number, it works at any length.
"""

from __future__ import annotations

from ray_pipeline.reasoning import parse
from ray_pipeline.rewards.registry import reward
from ray_pipeline.tools.calls import own_words

HALVING_CHARACTERS = 1000


@reward("length", isolated=False)
def length(prompt: str, completion: str, reference: str) -> float:
    """Between 1.0 and 0.0: halved by every 1,000 characters; 0.0 where nothing is answered, or thinking never ends.

    Args:
        completion: what the model wrote. prompt and reference are not looked at.
    """
    del prompt, reference
    words = own_words(completion)
    reasoned = parse(words)
    if reasoned.unclosed or not (reasoned.answer or "").strip():
        return 0.0
    return float(2.0 ** (-len(words) / HALVING_CHARACTERS))

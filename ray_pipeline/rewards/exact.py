"""Is the final answer the reference's text, letter for letter? Never raises."""

from __future__ import annotations

from ray_pipeline.rewards.answer import final_text
from ray_pipeline.rewards.registry import reward


@reward("exact", isolated=False, judges=True)
def exact(prompt: str, completion: str, reference: str) -> float:
    """1.0 where what follows the thinking is the reference, but for space around it; else 0.0.

    Args:
        prompt: not looked at. reference: the answer alone, or a worked solution that ends with `#### answer`.
    """
    del prompt
    final = final_text(completion)
    expected = reference.rpartition("####")[2].strip()
    return float(final is not None and final.strip() == expected != "")

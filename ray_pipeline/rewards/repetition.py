"""A penalty for saying the same again: the share of repeated n-grams (arXiv:2502.03373). Never raises."""

from __future__ import annotations

from ray_pipeline.rewards.registry import reward
from ray_pipeline.tools.calls import own_words

NGRAM_WORDS = 6


@reward("repetition", isolated=False)
def repetition(prompt: str, completion: str, reference: str) -> float:
    """0.0 for a completion whose runs of 6 words are all different, towards -1.0 for one that loops.

    Args:
        completion: what the model wrote; shorter ones than 6 words score 0.0. prompt and reference are not looked at.
    """
    del prompt, reference
    words = own_words(completion).casefold().split()
    total = len(words) - NGRAM_WORDS + 1
    if total < 1:
        return 0.0
    different = len({tuple(words[i : i + NGRAM_WORDS]) for i in range(total)})
    return different / total - 1.0

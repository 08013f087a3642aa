"""Pipeline schedules as data. No tensors, no processes."""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """One step of one pipeline stage: the forward or the backward of one micro-batch."""

    forward: bool
    micro_batch: int


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """1F1B (PipeDream-Flush, arXiv:2006.09503): at most `stages - stage` activations are alive on a stage."""
    warmup = min(stages - 1 - stage, micro_batches)
    actions = [Action(True, i) for i in range(warmup)]
    for i in range(micro_batches - warmup):
        actions += [Action(True, warmup + i), Action(False, i)]
    return actions + [Action(False, i) for i in range(micro_batches - warmup, micro_batches)]


def forward_only(micro_batches: int) -> list[Action]:
    """Every micro-batch forward, in order: evaluation and reference models."""
    return [Action(True, i) for i in range(micro_batches)]

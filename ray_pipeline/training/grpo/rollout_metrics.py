"""What is reported of an iteration's rollouts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from ray_pipeline.rollouts.collector import Collected, is_informative
from ray_pipeline.rollouts.rollout import Marked

# Rewards that say whether an answer is right; the first of them that is used is the accuracy.
CORRECTNESS = ("answer", "math", "exact")


def mean(values: Iterable[float]) -> float:
    """Of those that are numbers; 0 of none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else 0.0


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """Rewards and their parts, lengths in tokens, shares of what was cut off or skipped, seconds, use of tools."""
    marked = [one for group in collected.groups for one in group]
    rewards = [one.reward for one in marked if not one.failed]
    lengths = [len(one.completion.tokens) for one in marked]
    names = sorted({name for one in marked for name in one.parts})
    parts = {name: mean(one.parts.get(name, math.nan) for one in marked) for name in names}
    right = next((parts[name] for name in CORRECTNESS if name in parts), None)
    return {
        "reward": mean(rewards),
        "reward_std": statistics.pstdev(rewards) if rewards else 0.0,
        **{f"{name}_reward": value for name, value in parts.items()},
        **({} if right is None else {"accuracy": right}),
        **({"format_rate": parts["format"]} if "format" in parts else {}),
        "completion_tokens": mean(lengths),
        "completion_tokens_min": float(min(lengths, default=0)),
        "completion_tokens_max": float(max(lengths, default=0)),
        "repetition": mean(repeated(one.completion.tokens) for one in marked),
        "truncated": mean(not one.completion.finished for one in marked),
        "zero_variance_groups": collected.alike / max(collected.drawn, 1),
        "drawn_groups": float(collected.drawn),
        "skipped_groups": float(sum(not is_informative(group) for group in collected.groups)),
        "failed_rewards": float(sum(collected.failures.values())),
        **{f"failed_{name}_rewards": float(count) for name, count in collected.failures.items()},
        **tool_metrics(marked),
        **{f"{name}_seconds": seconds for name, seconds in collected.seconds.items()},
    }


def repeated(tokens: Sequence[int], size: int = 4) -> float:
    """Share of an answer's runs of `size` tokens that stood in it before; 0 of a short one."""
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def tool_metrics(marked: Iterable[Marked]) -> dict[str, float]:
    """Calls per answer, shares of calls that a tool could take and that gave an error; nothing without tools."""
    used = [one.completion.tools for one in marked if one.completion.tools is not None]
    if not used:
        return {}
    calls, valid, errors = (sum(getattr(use, name) for use in used) for name in ("calls", "valid", "errors"))
    return {
        "tool_calls": calls / len(used),
        "valid_tool_calls": valid / max(calls, 1),
        "tool_errors": errors / max(calls, 1),
    }

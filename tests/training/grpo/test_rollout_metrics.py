"""What is reported of an iteration's rollouts."""

from __future__ import annotations

import math

from model.generate.decode import Completion, ToolUse
from ray_pipeline.rollouts.collector import Collected
from ray_pipeline.rollouts.rollout import Marked
from ray_pipeline.training.grpo.rollout_metrics import rollout_metrics


def rollout(reward: float, tokens: int, *, finished: bool = True, failed: bool = False, **more) -> Marked:
    parts = {"math": math.nan if failed else reward, "format": 1.0}
    return Marked(Completion([1], [2] * tokens, [-1.0] * tokens, finished, **more), reward, parts, failed=failed)


def test_figures_of_two_groups_by_hand():
    same = [rollout(1.0, 2, tools=ToolUse(2, 1, 1)), rollout(1.0, 4, finished=False, tools=ToolUse(0, 0, 0))]
    mixed = [rollout(0.0, 6, tools=ToolUse(1, 1, 0)), rollout(math.nan, 8, failed=True, tools=ToolUse(1, 0, 0))]
    collected = Collected(0, [same, mixed], 3, drawn=3, alike=2, failures={"math": 1})
    figures = rollout_metrics(collected)
    assert figures["reward"] == figures["accuracy"] == figures["math_reward"] == 2 / 3
    assert figures["format_rate"] == 1.0 and abs(figures["reward_std"] - math.sqrt(2) / 3) < 1e-12
    assert (figures["completion_tokens"], figures["completion_tokens_max"], figures["truncated"]) == (5.0, 8.0, 0.25)
    assert (figures["zero_variance_groups"], figures["drawn_groups"]) == (2 / 3, 3.0)
    assert figures["skipped_groups"] == 2.0, "of the second, one answer is left to compare"
    assert figures["failed_rewards"] == figures["failed_math_rewards"] == 1.0
    assert (figures["tool_calls"], figures["valid_tool_calls"], figures["tool_errors"]) == (1.0, 0.5, 0.25)


def test_there_is_nothing_of_tools_without_any():
    assert not [name for name in rollout_metrics(Collected(0, [[rollout(1.0, 1)]], 1, drawn=1)) if "tool" in name]

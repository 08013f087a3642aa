"""How figures are said, in the terminal and on the page."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray_pipeline.evaluation.outcome import Report
from ray_pipeline.evaluation.statistics import PairedTest
from ray_pipeline.records.units import count_text, number_text, percent

SIGNIFICANT = 0.05
# What is written beside the accuracy: title, key of `TaskResult.figures`, how it is said.
RATES = (
    ("format", "format_rate", percent),
    ("finished", "finished_rate", percent),
    ("tokens", "mean_tokens", lambda value: f"{value:.1f}"),
    ("thinking", "mean_thinking_tokens", lambda value: f"{value:.1f}"),
    ("overhead", "thinking_overhead", lambda value: f"{value:.2f}x"),
    ("steps right", "steps_right_rate", percent),
    ("verified", "verified_rate", percent),
    ("reflects", "reflection_rate", percent),
    ("valid calls", "valid_tool_call_rate", percent),
    ("tokens/s", "tokens_per_second", number_text),
)
MEANINGS = (
    ("accuracy", "right answers, with the 95% Wilson interval over questions"),
    ("format", "one block of thinking, then an answer"),
    ("finished", "ended by itself, not at the limit"),
    ("thinking", "mean tokens between <think> and </think>"),
    ("overhead", "thinking tokens per answer token"),
    ("steps right", "the working has arithmetic statements, and all of them hold"),
    ("verified", "such working that also gives the final result: the answer verifies itself"),
    ("reflects", "a phrase of doubt or checking"),
    ("valid calls", "tool calls that were well formed, of all calls"),
)


def share_text(figure: Mapping[str, Any], key: str = "accuracy") -> str:
    """`61.3% [55.1, 67.2]`"""
    low, high = figure["interval"]
    return f"{percent(figure[key])} [{100 * low:.1f}, {100 * high:.1f}]"


def rate_texts(figures: Mapping[str, Any]) -> dict[str, str]:
    """Title -> text of every rate that the task has."""
    return {title: say(figures[key]) for title, key, say in RATES if figures.get(key) is not None}


def accuracy_text(figures: Mapping[str, Any]) -> str:
    """The accuracy with its interval, or a dash where no question was marked."""
    return share_text(figures) if figures["questions"] else "–"


def sampled_texts(figures: Mapping[str, Any]) -> dict[str, str]:
    """`pass@4` -> its value with interval, and maj@k alike; nothing for k = 1, which is the accuracy."""
    out: dict[str, str] = {}
    if figures.get("samples", 1) > 1:
        for title, key in (("pass", "pass_at_k"), ("maj", "maj_at_k")):
            out |= {f"{title}@{k}": share_text(f, "value") for k, f in figures.get(key, {}).items() if k != "1"}
    return out


def model_text(report: Report) -> str:
    """`quickstart (grpo), 1.31M parameters`"""
    parameters = report.model.get("parameters")
    return str(report.model["name"]) + (f", {count_text(parameters)} parameters" if parameters else "")


def settings_text(report: Report) -> str:
    """How it was asked, and when."""
    settings, written = report.settings, time.strftime("%Y-%m-%d %H:%M", time.localtime(report.created))
    parts = [f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value not in (None, [], ())]
    return f"{written}; {', '.join(parts)}"


def test_text(test: PairedTest) -> str:
    """`+4.0 points [+1.0, +7.1], better on 12 and worse on 3 of 200, p = 0.035`"""
    low, high = (100 * bound for bound in test.interval)
    return (
        f"{100 * test.difference:+.1f} points [{low:+.1f}, {high:+.1f}], better on {test.better} and worse on "
        f"{test.worse} of {test.questions}, p = {test.p_value:.3g}"
    )


def verdict(test: PairedTest) -> str:
    """What the test allows to be said."""
    if test.p_value >= SIGNIFICANT:
        return "no difference shown"
    return "better" if test.difference > 0 else "worse"

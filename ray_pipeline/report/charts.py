"""A stage's logged figures as plain data for the page's charts: curves over steps, and how often experts were used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Lines = Sequence[Mapping[str, Any]]
Chart = dict[str, Any]

LARGEST = 1e30  # a figure beyond this is a diverged one, and would flatten all others
MOST_POINTS = 1500  # of a chart; of more every second, third ... is shown, and the page says so
MOST_COLUMNS, MOST_EXPERTS = 240, 64  # of a heat map
EXACT = ("val/", "train/lr", "memory/")  # names of figures that are no sample of something: nothing to smooth
DIGITS = 6  # that are kept of a figure: a pixel is coarser
PHASES = ("step", "forward_backward", "next_batch", "optimizer_step")
# Charts of a stage: title, logged names of its lines (`*`: any), baselines drawn as levels.
CHARTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Loss", ("train/loss", "val/validation_loss*"), ("ln_vocab", "unigram_entropy", "input_loss")),
    ("Held-out accuracy", ("val/accuracy",), ("input_accuracy", "teacher_accuracy")),
    ("Held-out preference accuracy", ("val/preference_accuracy",), ("input_preference_accuracy",)),
    ("Margin of the chosen answer", ("train/margin", "val/margin"), ()),
    ("Divergence from the teacher", ("train/divergence",), ()),
    ("Reward and its parts", ("grpo/reward", "grpo/*_reward"), ()),
    ("KL to the reference", ("grpo/kl",), ()),
    ("Entropy of the policy", ("grpo/entropy",), ()),
    ("Tokens of an answer: mean, least, most", ("grpo/completion_tokens*", "train/answer_tokens"), ()),
    ("Shares of tokens that were clipped", ("grpo/clipped_low", "grpo/clipped_high"), ()),
    ("Groups whose answers all scored the same", ("grpo/zero_variance_groups",), ()),
    ("Gap of the sampler's log-probabilities to the trainer's", ("grpo/logprob_gap",), ()),
    ("Loss of multi-token prediction", ("mtp/cross_entropy",), ()),
    ("Losses of layers", ("train/aux_loss", "train/indexer_kl"), ()),
    ("Gradient norm", ("train/grad_norm",), ()),
    ("Learning rate", ("train/lr",), ()),
    ("Tokens per second", ("perf/tokens_per_second",), ()),
    ("Seconds of a step, and of its phases on rank 0", tuple(f"perf/{phase}_seconds" for phase in PHASES), ()),
    ("Share of the GPUs' peak", ("perf/mfu",), ()),
    ("Memory of a rank, 10^9 bytes", ("memory/max_gb", "memory/min_gb"), ()),
    ("Experts: entropy of the load, least even layer", ("moe/load_entropy",), ()),
    ("Experts: busiest over the mean, least even layer", ("moe/largest_load",), ()),
)


def stage_charts(lines: Lines, baselines: Mapping[str, float]) -> list[Chart]:
    """Each of `CHARTS` that the logged lines have points for.

    Returns:
        `title`, `x` (steps), `series` (each `name`, `values`, null where it has none, and `noisy`: whether it may be
        smoothed), `levels`, and `every`: one of how many points is shown.
    """
    logged = dict.fromkeys(name for line in lines for name in line if "/" in name)
    found = [_chart(title, _matching(names, logged), levels, lines, baselines) for title, names, levels in CHARTS]
    return [chart for chart in found if chart is not None]


def _matching(patterns: Iterable[str], logged: Iterable[str]) -> list[str]:
    """Logged names that the patterns mean, in the patterns' order, each once."""
    out: dict[str, None] = {}
    for pattern in patterns:
        before, star, after = pattern.partition("*")
        for name in logged:
            if name == pattern or (star and name.startswith(before) and name.endswith(after)):
                out[name] = None
    return list(out)


def _chart(
    title: str, names: Sequence[str], levels: Sequence[str], lines: Lines, baselines: Mapping[str, float]
) -> Chart | None:
    points = {name: finite_points(lines, name) for name in names}
    points = {name: found for name, found in points.items() if found}
    if not points:
        return None
    steps = sorted({step for found in points.values() for step in found})
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    rare = {step for found in points.values() if len(found) * 4 < len(steps) for step in found}  # evaluations
    shown = [step for i, step in enumerate(steps) if i % every == 0 or i == len(steps) - 1 or step in rare]
    return {
        "title": title,
        "x": shown,
        "series": [
            {
                "name": short_name(name),
                "noisy": not name.startswith(EXACT),
                "values": [rounded(found.get(step)) for step in shown],
            }
            for name, found in points.items()
        ],
        "levels": [
            {"name": level.replace("_", " "), "value": rounded(baselines[level])}
            for level in levels
            if level in baselines and math.isfinite(baselines[level])
        ],
        "every": every,
    }


def finite_points(lines: Lines, name: str) -> dict[int, float]:
    """Step -> value of one figure; a step that was logged twice has its last value. No NaN, nothing diverged."""
    return {line["step"]: line[name] for line in lines if name in line and abs(line[name]) < LARGEST}


def rounded(value: float | None) -> float | None:
    """To as many digits as can be seen."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


def short_name(name: str) -> str:
    """`train/grad_norm` -> `grad norm`."""
    for section in ("train/", "val/", "grpo/", "perf/", "memory/", "mtp/", "moe/"):
        name = name.removeprefix(section)
    return name.replace("_", " ")


def expert_maps(lines: Lines) -> list[dict[str, Any]]:
    """How many tokens each expert got in the logged steps, by layer.

    Returns:
        `layer`, `steps`, and `rows`: for each expert, or for the mean of neighbours where there are many, its load in
        hundredths of the layer's mean.
    """
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("moe/") and name.endswith("/load"))
    return [_expert_map(name, [line for line in lines if name in line]) for name in sorted(names, key=_layer_order)]


def _layer_order(name: str) -> tuple[int, int, str]:
    digits = "".join(filter(str.isdigit, name))
    return "mtp" in name, int(digits or 0), name


def _expert_map(name: str, lines: Lines) -> dict[str, Any]:
    every = math.ceil(len(lines) / MOST_COLUMNS)
    shown = lines[::every]
    experts = len(shown[0][name])
    rows = min(experts, MOST_EXPERTS)
    columns = [_shares(line[name], rows) for line in shown]
    return {
        "layer": name.removeprefix("moe/").removesuffix("/load"),
        "experts": experts,
        "steps": [line["step"] for line in shown],
        "rows": [[column[row] for column in columns] for row in range(rows)],
    }


def _shares(loads: Sequence[float], rows: int) -> list[int]:
    """Hundredths of the mean load, over `rows` groups of neighbours."""
    mean, count = sum(loads) / len(loads), len(loads)
    groups = [loads[count * i // rows : count * (i + 1) // rows] for i in range(rows)]
    return [round(100 * sum(group) / len(group) / mean) if mean else 0 for group in groups]

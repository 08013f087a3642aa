#!/usr/bin/env python3
"""GRPO on a pretrained model, without SFT: accuracy and length of its answers over the steps, over several seeds.

python scripts/measure_zero.py                         # the recipe tiny-zero, seeds 0, 1, 2: some minutes each
python scripts/measure_zero.py --seeds 0 --set grpo.steps=20

A seed decides the data, the held-out questions and every draw. Runs are kept and gone on with. Figures and a picture
are written; the exit status is 1 where accuracy or length did not rise with a seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ray_pipeline.records.metrics_file import read_metrics  # noqa: E402
from scripts.measure_recipe import call, stage_figures  # noqa: E402
from scripts.parallel_bench.results import provenance  # noqa: E402

ENDS = 5  # steps at the beginning and at the end whose means are compared
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 720, 250, 48, 64, 28, 64  # pixels
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280")
# Figure, title of its panel, factor, ending of its numbers.
PANELS = (
    ("heldout", "Held-out accuracy, greedy", 100, "%"),
    ("tokens", "Tokens of a sampled answer, mean", 1, ""),
)
Curve = list[tuple[int, float]]


def measure(recipe: str, seed: int, runs: Path, more: Sequence[str]) -> dict[str, Any]:
    """Train one seed, or go on with it: its curves by name, each [[step, value], ...].

    Raises:
        SystemExit: GRPO is not finished.
    """
    name = f"measure-{Path(recipe).stem}-seed{seed}"
    call("run", "--config", recipe, "--run-name", name, "--set", f"seed={seed}", "--output-dir", str(runs), *more)
    entry = stage_figures(runs / name, "grpo")
    lines = read_metrics(Path(entry["folder"]))
    start = (0, entry["baselines"]["input_accuracy"])
    return {
        "seed": seed, "seconds": entry["seconds"], "heldout": [start, *curve(lines, "val/accuracy")],
        "sampled": curve(lines, "grpo/accuracy"), "tokens": curve(lines, "grpo/completion_tokens"),
    }  # fmt: skip


def curve(lines: Sequence[dict[str, Any]], name: str) -> Curve:
    """Points of a figure by step; the last one counts where a step was taken twice."""
    return sorted({line["step"]: line[name] for line in lines if name in line}.items())


def ends(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Means of the first and of the last few values."""
    values = [value for _, value in points]
    return fmean(values[:ENDS]), fmean(values[-ENDS:])


def rises(seed: dict[str, Any]) -> bool:
    """Whether held-out accuracy, sampled accuracy and length all end higher than they began."""
    pairs = [(seed["heldout"][0][1], seed["heldout"][-1][1]), ends(seed["sampled"]), ends(seed["tokens"])]
    return all(last > first for first, last in pairs)


def table(seeds: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each seed."""
    rows = ["| seed | held-out accuracy | accuracy of samples | tokens of an answer | seconds |", "|---" * 5 + "|"]
    for seed in seeds:
        (first, last), (short, long) = ends(seed["sampled"]), ends(seed["tokens"])
        before, after = seed["heldout"][0][1], seed["heldout"][-1][1]
        rows.append(
            f"| {seed['seed']} | {before:.1%} to {after:.1%} | {first:.1%} to {last:.1%} | {short:.1f} to {long:.1f} "
            f"| {seed['seconds']:.0f} |"
        )
    return "\n".join(rows)


def picture(data: dict[str, Any]) -> str:
    """Accuracy and length over steps as SVG, side by side, a line for each seed."""
    caption = f"{data['recipe']}, {data['hardware']}, commit {data['commit'][:7]}"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        '<text x="10" y="18" font-size="13">GRPO on a pretrained model, no demonstrations</text>',
        f'<text x="10" y="34" fill="#718096">{escape(caption)}</text>',
    ]
    for index, seed in enumerate(data["seeds"]):
        x = WIDTH - 70 * (len(data["seeds"]) - index)
        out.append(f'<rect x="{x}" y="9" width="11" height="11" fill="{COLOURS[index % len(COLOURS)]}"/>')
        out.append(f'<text x="{x + 15}" y="19">seed {seed["seed"]}</text>')
    width = (WIDTH - 2 * LEFT - GAP) / len(PANELS)
    for number, (name, title, factor, unit) in enumerate(PANELS):
        curves = [[(step, factor * value) for step, value in seed[name]] for seed in data["seeds"]]
        out += panel(title, unit, curves, LEFT + number * (width + GAP), width)
    return "\n".join([*out, "</svg>", ""])


def panel(title: str, unit: str, curves: Sequence[Curve], left: float, width: float) -> list[str]:
    """One figure: a line for each curve, from zero to the largest value."""
    steps, most = max(curve[-1][0] for curve in curves), max(value for curve in curves for _, value in curve)
    floor = HEIGHT - BOTTOM
    out = [f'<text x="{left:.1f}" y="{TOP - 8}">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = floor - share * (floor - TOP)
        out.append(f'<line x1="{left:.1f}" x2="{left + width:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e8f0"/>')
        label = f"{share * most:.0f}{unit}"
        out.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="#718096">{label}</text>')
    for step, anchor in ((0, "start"), (steps, "end")):
        x = left + width * step / steps
        text = f"step {step}"
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}" fill="#718096">{text}</text>')
    for index, points in enumerate(curves):
        path = " ".join(
            f"{left + width * step / steps:.1f},{floor - value / most * (floor - TOP):.1f}" for step, value in points
        )
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="1.6"/>'
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny-zero.yaml"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: scripts/results/HARDWARE")
    given, more = parser.parse_known_args(argv)
    seeds = [measure(given.config, int(seed), given.output_dir.absolute(), more) for seed in given.seeds.split(",")]
    where = provenance(ROOT, "cpu")
    out = given.out or ROOT / "scripts" / "results" / where["hardware"]
    out.mkdir(parents=True, exist_ok=True)
    data = {"measured": "measure_zero", "recipe": Path(given.config).stem, **where, "seeds": seeds}
    (out / "measure_zero.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    (out / "measure_zero.svg").write_text(picture(data), encoding="utf-8")
    print(table(seeds))
    risen = all(map(rises, seeds))
    print("Accuracy and length rise with every seed." if risen else "NOT with every seed do accuracy and length rise.")
    return 0 if risen else 1


if __name__ == "__main__":
    sys.exit(main())

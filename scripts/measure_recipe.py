#!/usr/bin/env python3
"""What a recipe reaches on held-out questions, over several seeds, with 95% intervals.

python scripts/measure_recipe.py                       # the tiny recipe, seeds 0, 1, 2: half an hour on two cores
python scripts/measure_recipe.py --seeds 3,4 --readme  # and write the table into the README

For every seed the whole chain up to DISTILLATION, then once more the same student trained by SFT alone, on as many
steps of the same conversations. A seed decides the data, the held-out questions and every draw. Runs are kept and gone
on with: what is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ray_pipeline.dag.ledger import read_status  # noqa: E402
from ray_pipeline.evaluation.statistics import wilson_interval  # noqa: E402
from ray_pipeline.settings.loading import load_config  # noqa: E402
from scripts.parallel_bench.results import provenance  # noqa: E402

# The student learns from conversations, as in SFT, and from no teacher.
SFT_ALONE = {
    "distillation.loss": "cross_entropy", "distillation.teacher_answers": "0", "distillation.on_policy": "0",
    "distillation.conversations": "true",
}  # fmt: skip
NAMES = {
    "pretrained": "PRETRAIN's model",
    "sft": "SFT",
    "grpo": "GRPO",
    "student": "student, distilled",
    "student_sft": "same student, SFT alone",
}
# What the recipe promises: (gain, of, over, points).
PROMISES = (
    ("SFT over pretrained", "sft", "pretrained", 30.0),
    ("GRPO over SFT", "grpo", "sft", 15.0),
    ("student against its teacher", "student", "grpo", -5.0),
    ("student over SFT alone", "student", "student_sft", 10.0),
)
START, END = "<!-- measure_recipe -->", "<!-- end of measure_recipe -->"


def difference_interval(a: int, b: int, total: int) -> tuple[float, float]:
    """95% bounds of a/total - b/total, as if of independent samples (Newcombe 1998, method 10)."""
    (low_a, high_a), (low_b, high_b) = wilson_interval(a, total), wilson_interval(b, total)
    p, q = a / total, b / total
    return p - q - math.hypot(p - low_a, high_b - q), p - q + math.hypot(high_a - p, q - low_b)


def call(verb: str, *arguments: str) -> None:
    """A verb of the program. A stage that learned nothing ends it with 1 as well: the ledger tells which it was."""
    subprocess.run([sys.executable, "-m", "ray_pipeline.cli", verb, *arguments], cwd=ROOT, check=False)


def stage_figures(run_dir: Path, stage: str) -> dict[str, Any]:
    """Ledger entry of a finished stage.

    Raises:
        SystemExit: it is not finished.
    """
    entry = next(e for e in read_status(run_dir)["stages"] if e["stage"] == stage)
    if entry["status"] not in ("done", "learned_nothing"):
        sys.exit(f"{run_dir.name}: {stage} is {entry['status']}")
    return entry


def measure(recipe: str, seed: int, runs: Path, more: Sequence[str]) -> dict[str, Any]:
    """Train one seed, or go on with it, and return its accuracies in shares of the questions."""
    name = f"measure-{Path(recipe).stem}-seed{seed}"
    place = ("--output-dir", str(runs))
    until = ("--until", "distillation", *place)
    call("run", "--config", recipe, "--run-name", name, "--set", f"seed={seed}", *until, *more)
    folder = runs / name
    sft, grpo, student = (stage_figures(folder, stage) for stage in ("sft", "grpo", "distillation"))
    settings = [part for key, value in SFT_ALONE.items() for part in ("--set", f"{key}={value}")]
    call("resume", name, *settings, *until)
    alone = stage_figures(folder, "distillation")
    distillation = load_config(Path(recipe)).distillation
    own = [part for key in SFT_ALONE for part in ("--set", f"{key}={getattr(distillation, key.rpartition('.')[2])}")]
    call("resume", name, *own, *until)  # the run is left as the recipe has it
    accuracies = {
        "pretrained": sft["baselines"]["input_accuracy"], "sft": sft["metrics"]["accuracy"],
        "grpo": grpo["metrics"]["accuracy"], "student": student["metrics"]["accuracy"],
        "student_sft": alone["metrics"]["accuracy"],
    }  # fmt: skip
    sizes = {key: student["metrics"][key] for key in ("params", "teacher_params")}
    return {"seed": seed, "accuracy": accuracies, "seconds": {
        "sft": sft["seconds"], "grpo": grpo["seconds"], "student": student["seconds"]}} | sizes  # fmt: skip


def pooled(seeds: Sequence[dict[str, Any]], questions: int) -> dict[str, Any]:
    """All seeds' questions together: accuracies and promised gains, in points, with their bounds."""
    total = questions * len(seeds)
    right = {name: round(sum(seed["accuracy"][name] for seed in seeds) * questions) for name in NAMES}
    bounds = {name: wilson_interval(right[name], total) for name in NAMES}
    accuracy = {name: [100 * right[name] / total, *(100 * bound for bound in bounds[name])] for name in NAMES}
    gains = {}
    for title, of, over, wanted in PROMISES:
        low, high = difference_interval(right[of], right[over], total)
        gain = 100 * (right[of] - right[over]) / total
        worst = min(100 * (seed["accuracy"][of] - seed["accuracy"][over]) for seed in seeds)
        gains[title] = {"points": gain, "low": 100 * low, "high": 100 * high, "worst_seed": worst, "promised": wanted}
    return {"questions": total, "accuracy": accuracy, "gains": gains}


def table(seeds: Sequence[dict[str, Any]], total: dict[str, Any]) -> str:
    """Markdown for the README."""
    head = "| | " + " | ".join(f"seed {seed['seed']}" for seed in seeds) + " | all, 95% interval |"
    rows = [head, "|---|" + "---|" * (len(seeds) + 1)]
    for name, title in NAMES.items():
        mean, low, high = total["accuracy"][name]
        each = " | ".join(f"{100 * seed['accuracy'][name]:.1f}%" for seed in seeds)
        rows.append(f"| {title} | {each} | {mean:.1f}% ({low:.1f} to {high:.1f}) |")
    for title, gain in total["gains"].items():
        of, over = next((of, over) for name, of, over, _ in PROMISES if name == title)
        each = " | ".join(f"{100 * (seed['accuracy'][of] - seed['accuracy'][over]):+.1f}" for seed in seeds)
        rows.append(f"| {title} | {each} | {gain['points']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f}) |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: scripts/results/HARDWARE")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    given, more = parser.parse_known_args(argv)
    seeds = [measure(given.config, int(seed), given.output_dir.absolute(), more) for seed in given.seeds.split(",")]
    total = pooled(seeds, load_config(Path(given.config)).evaluation.questions)
    text = table(seeds, total)
    print(text)
    where = provenance(ROOT, "cpu")
    out = given.out or ROOT / "scripts" / "results" / where["hardware"]
    out.mkdir(parents=True, exist_ok=True)
    data = {"measured": "measure_recipe", "recipe": Path(given.config).stem, **where, "seeds": seeds, "all": total}
    (out / "measure_recipe.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if given.readme:
        readme = ROOT / "README.md"
        old = readme.read_text(encoding="utf-8")
        new = re.sub(f"(?<={START}\n).*(?={END})", lambda _: f"{text}\n", old, flags=re.DOTALL)
        readme.write_text(new, encoding="utf-8")
    kept = all(gain["points"] >= gain["promised"] for gain in total["gains"].values())
    print("Every promise is kept." if kept else "NOT every promise is kept: see the gains above.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

"""report.html: a run on one page that needs no other file. Summary, curves, sample answers (`templates/run.html`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ray_pipeline.records.artifacts import write_text
from ray_pipeline.records.metrics_file import read_metrics, read_samples
from ray_pipeline.records.units import seconds_text
from ray_pipeline.report.curves import chart
from ray_pipeline.report.summary import summary_rows
from ray_pipeline.settings.run_folder import REPORT_FILE

MOST_SAMPLES = 12
# Charts of a stage: title, logged names of its lines, baselines drawn as levels.
CHARTS = (
    ("Loss", ("train/loss", "val/validation_loss"), ("ln_vocab", "unigram_entropy", "input_loss")),
    ("Held-out accuracy", ("val/accuracy",), ("input_accuracy", "teacher_accuracy")),
    ("Held-out preference accuracy", ("val/preference_accuracy",), ("input_preference_accuracy",)),
    ("Margin of the chosen answer", ("train/margin", "val/margin"), ()),
    ("Divergence from the teacher", ("train/divergence",), ()),
    ("Reward", ("grpo/reward", "grpo/answer_reward", "grpo/format_reward"), ()),
    ("KL to the reference", ("grpo/kl",), ()),
    ("Gap of the sampler's log-probabilities to the trainer's", ("grpo/logprob_gap",), ()),
    ("Tokens of an answer", ("grpo/completion_tokens", "train/answer_tokens"), ()),
    ("Gradient norm", ("train/grad_norm",), ()),
    ("Losses of layers", ("train/aux_loss", "train/indexer_kl"), ()),
    ("Experts: entropy of the load, least even layer", ("moe/load_entropy",), ()),
    ("Experts: busiest over the mean, least even layer", ("moe/largest_load",), ()),
    ("Tokens per second", ("perf/tokens_per_second",), ()),
)
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write_report(run_dir: Path, status: Mapping[str, Any]) -> Path:
    """Write the page for `ledger.read_status`'s answer into the run folder and return its path."""
    write_text(run_dir / REPORT_FILE, render(status))
    return run_dir / REPORT_FILE


def render(status: Mapping[str, Any]) -> str:
    """The page for `ledger.read_status`'s answer; reads metrics.jsonl and samples.json of the stages' folders."""
    entries = status["stages"]
    stages = [_stage(entry) for entry in entries if "attempt" in entry]
    digests = [(entry.get("weights_digest") or "")[:12] for entry in entries]
    return TEMPLATES.get_template("run.html").render(
        title=status["run"],
        folder=status["run_dir"],
        cost=status.get("cost") or "",
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        rows=list(zip(summary_rows(entries), digests, strict=True)),
        stages=[stage for stage in stages if any(stage[part] for part in ("error", "damaged", "charts", "samples"))],
        seconds_text=seconds_text,
    )


def _stage(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows below the table of one stage that began."""
    folder = Path(entry["folder"])
    return {
        "name": entry["stage"],
        "error": entry.get("error") or "",
        "damaged": entry.get("damaged", []),
        "charts": _charts(read_metrics(folder), entry.get("baselines") or {}),
        "samples": _samples(folder),
    }


def _charts(lines: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> list[str]:
    """Each of `CHARTS` that the logged lines have points for, as a figure in HTML."""
    charts = []
    for title, names, levels in CHARTS:
        drawn_names = [*names, *(_of_sources(lines) if "val/validation_loss" in names else ())]
        series = {_short(name): [(line["step"], line[name]) for line in lines if name in line] for name in drawn_names}
        held = {level.replace("_", " "): baselines[level] for level in levels if level in baselines}
        charts.append(chart(title, series, held))
    return [drawn for drawn in charts if drawn]


def _of_sources(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Logged names of the held-out loss of single sources, as far as there are colours."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("val/validation_loss/"))
    return list(names)[:2]


def _short(name: str) -> str:
    return name.removeprefix("train/").removeprefix("val/").replace("_", " ")


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Questions and the model's answers; nothing where the file is damaged, which the ledger tells."""
    try:
        found = read_samples(folder)
    except ValueError:
        return []
    return [sample if isinstance(sample, dict) else {"answer": sample} for sample in found[:MOST_SAMPLES]]

"""report.html: a run on one page that needs nothing but itself. Summary, curves, sample answers; light and dark."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ray_pipeline.records.artifacts import write_text
from ray_pipeline.records.progress import seconds_text
from ray_pipeline.records.trackers import read_metrics, read_samples
from ray_pipeline.report.curves import chart
from ray_pipeline.report.summary import summary_rows
from ray_pipeline.settings.run_folder import REPORT_FILE

MOST_SAMPLES = 12
# Charts of a stage: title, logged names of its lines, baselines drawn as levels.
CHARTS = (
    ("Loss", ("train/loss", "eval/validation_loss"), ("ln_vocab", "unigram_entropy", "input_loss")),
    ("Held-out accuracy", ("eval/accuracy",), ("input_accuracy", "teacher_accuracy")),
    ("Held-out preference accuracy", ("eval/preference_accuracy",), ("input_preference_accuracy",)),
    ("Margin of the chosen answer", ("train/margin", "eval/margin"), ()),
    ("Divergence from the teacher", ("train/divergence",), ()),
    ("Reward", ("train/reward", "train/answer_reward", "train/format_reward"), ()),
    ("KL to the reference", ("train/kl",), ()),
    ("Gap of the sampler's log-probabilities to the trainer's", ("train/logprob_gap",), ()),
    ("Tokens of an answer", ("train/completion_tokens", "train/answer_tokens"), ()),
    ("Gradient norm", ("train/grad_norm",), ()),
    ("Losses of layers", ("train/aux_loss", "train/indexer_kl"), ()),
    ("Experts: entropy of the load, least even layer", ("train/load_entropy",), ()),
    ("Experts: busiest over the mean, least even layer", ("train/largest_load",), ()),
    ("Tokens per second", ("tokens_per_second",), ()),
)
STYLE = """
:root{--bg:#fbfbfa;--fg:#1d1d1f;--soft:#6b6b70;--line:#e3e3e0;--card:#fff;
--c1:#2563eb;--c2:#e07a1f;--c3:#159a6b;--c4:#9333ea;--good:#15803d;--bad:#b91c1c;--warn:#a16207}
@media(prefers-color-scheme:dark){:root{--bg:#141416;--fg:#ececee;--soft:#9a9aa2;--line:#2d2d31;--card:#1c1c1f;
--c1:#6ea3ff;--c2:#f4a259;--c3:#4fd1a1;--c4:#c58bff;--good:#4ade80;--bad:#f87171;--warn:#facc15}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1020px;margin:0 auto;padding:36px 20px 80px}
h1{font-size:26px;margin:0}h2{font-size:19px;margin:40px 0 10px}p{color:var(--soft);margin:4px 0}
.scroll{overflow-x:auto}table{width:100%;border-collapse:collapse;margin-top:18px}
th{color:var(--soft);font-weight:500;font-size:13px}th,td{text-align:left;padding:8px 14px 8px 0;vertical-align:top;
border-bottom:1px solid var(--line)}td:nth-child(5){white-space:nowrap}
.DONE,.REUSED{color:var(--good)}.FAILED{color:var(--bad)}.LEARNED,.INTERRUPTED{color:var(--warn)}.NOT{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:14px}
figure,.sample{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px}
figcaption{font-weight:600;display:flex;justify-content:space-between;gap:10px;flex-wrap:wrap}
small{font-weight:400;color:var(--soft)}small span{margin-left:10px}
i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:5px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11px}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}.grid{stroke:var(--line)}
line.level{stroke:var(--soft);stroke-dasharray:4 4}code,pre{font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0}.sample{margin-top:10px}.sample b{font-weight:600}
"""


def write_report(run_dir: Path, status: Mapping[str, Any]) -> Path:
    """Write the page for `ledger.read_status`'s answer into the run folder and return its path."""
    write_text(run_dir / REPORT_FILE, render(status))
    return run_dir / REPORT_FILE


def render(status: Mapping[str, Any]) -> str:
    """The page for `ledger.read_status`'s answer; reads metrics.jsonl and samples.json of the stages' folders."""
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    sections = "".join(_stage(entry) for entry in status["stages"] if "attempt" in entry)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(status["run"])}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"<h1>{escape(status['run'])}</h1><p>{escape(status['run_dir'])}</p><p>As of {written}</p>"
        f"{_table(status['stages'])}{sections}</main></body></html>\n"
    )


def _table(stages: Sequence[Mapping[str, Any]]) -> str:
    names = ("Stage", "Status", "Reached", "Held against", "Time", "Weights SHA-256")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = []
    for row, entry in zip(summary_rows(stages), stages, strict=True):
        digest = (entry.get("weights_digest") or "")[:12]
        seconds = "" if row.seconds is None else seconds_text(row.seconds)
        cells = [escape(row.stage), f'<span class="{row.status}">{row.status}</span>', escape(row.figure)]
        cells += [escape(row.against), seconds, f"<code>{digest}</code>"]
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _stage(entry: Mapping[str, Any]) -> str:
    folder = Path(entry["folder"])
    lines, baselines = read_metrics(folder), entry.get("baselines") or {}
    charts = []
    for title, names, levels in CHARTS:
        drawn_names = [*names, *(_of_sources(lines) if "eval/validation_loss" in names else ())]
        series = {_short(name): [(line["step"], line[name]) for line in lines if name in line] for name in drawn_names}
        held = {level.replace("_", " "): baselines[level] for level in levels if level in baselines}
        charts.append(chart(title, series, held))
    drawn = "".join(charts)
    samples = _samples(folder)
    damaged = "".join(f'<p class="FAILED">{escape(text)}</p>' for text in entry.get("damaged", []))
    error = f'<pre class="FAILED">{escape(entry["error"])}</pre>' if entry.get("error") else ""
    if not (drawn or samples or error or damaged):
        return ""
    return f'<h2>{escape(entry["stage"])}</h2>{error}{damaged}<div class="charts">{drawn}</div>{samples}'


def _of_sources(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Logged names of the held-out loss of single sources, as far as there are colours."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("eval/validation_loss/"))
    return list(names)[:2]


def _short(name: str) -> str:
    return name.removeprefix("train/").removeprefix("eval/").replace("_", " ")


def _samples(folder: Path) -> str:
    """Questions and the model's answers; nothing where the file is damaged, which `_stage` tells."""
    try:
        found = read_samples(folder)
    except ValueError:
        return ""
    cards = []
    for sample in found[:MOST_SAMPLES]:
        fields = sample if isinstance(sample, dict) else {"answer": sample}
        rows = "".join(f"<div><b>{escape(str(k))}</b><pre>{escape(str(v))}</pre></div>" for k, v in fields.items())
        cards.append(f'<div class="sample">{rows}</div>')
    return f"<details><summary>{len(cards)} sample answers</summary>{''.join(cards)}</details>" if cards else ""

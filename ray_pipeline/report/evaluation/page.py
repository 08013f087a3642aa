"""The report as one page that needs nothing but itself, in the style of a run's report.html."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ray_pipeline.evaluation.outcome import Report
from ray_pipeline.evaluation.results import ItemResult, Sample, TaskResult
from ray_pipeline.records.artifacts import write_text
from ray_pipeline.report.evaluation.formats import reporter
from ray_pipeline.report.evaluation.wording import (
    MEANINGS,
    accuracy_text,
    model_text,
    rate_texts,
    sampled_texts,
    settings_text,
    share_text,
    test_text,
    verdict,
)
from ray_pipeline.report.run_page import STYLE

MOST_SAMPLES = 8  # right ones, and as many wrong ones, of a task
OWN_STYLE = """
td.bar{width:38%;vertical-align:middle}.track{position:relative;height:10px;border-radius:3px;background:var(--line)}
.track b{position:absolute;top:0;bottom:0;left:0;border-radius:3px;background:var(--c1)}
.track em{position:absolute;top:4px;height:2px;background:var(--fg)}td.n{white-space:nowrap}
.right b.mark,.better{color:var(--good)}.wrong b.mark,.worse{color:var(--bad)}dl{margin:0;display:grid;gap:2px 14px;
grid-template-columns:max-content 1fr}dt{font-weight:600}dd{margin:0;color:var(--soft)}
summary{cursor:pointer;margin-top:12px}
"""


@reporter("html")
def write_page(report: Report, path: Path) -> None:
    """Atomically."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page."""
    title = f"Evaluation of {report.model['name']}"
    sections = "".join(_task(task) for task in report.tasks)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}{OWN_STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1><p>{escape(model_text(report))}</p>"
        f"<p>{escape(str(report.model.get('folder', '')))}</p><p>{escape(settings_text(report))}</p>"
        f"{_summary(report)}{_comparison(report)}{sections}{_meanings()}</main></body></html>\n"
    )


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str, kind: str = "n") -> str:
    return f'<td class="{kind}">{escape(text)}</td>'


def _summary(report: Report) -> str:
    all_figures = [task.figures() for task in report.tasks]
    columns: dict[str, None] = {}
    for figures in all_figures:
        columns |= dict.fromkeys([*sampled_texts(figures), *rate_texts(figures)])
    rows = []
    for task, figures in zip(report.tasks, all_figures, strict=True):
        texts = sampled_texts(figures) | rate_texts(figures)
        values = [task.name, str(figures["questions"]), accuracy_text(figures)]
        rows.append([_cell(value) for value in (*values, *(texts.get(column, "") for column in columns))])
    return _rows(("Task", "Questions", "Accuracy", *(c[:1].upper() + c[1:] for c in columns)), rows)


def _comparison(report: Report) -> str:
    if report.other is None:
        return ""
    rows = []
    for name, test in report.comparison.items():
        values = [name, f"{100 * test.accuracy:.1f}%", f"{100 * test.other_accuracy:.1f}%", test_text(test)]
        said = verdict(test)
        rows.append([*(_cell(value) for value in values), f'<td class="n {said.split()[0]}">{escape(said)}</td>'])
    head = ("Task", "Here", "There", "Difference, 95% interval, McNemar's exact test", "")
    return f"<h2>Against {escape(model_text(report.other))}</h2>{_rows(head, rows)}"


def _task(task: TaskResult) -> str:
    figures = task.figures()
    notes = []
    if figures.get("unmarked"):
        notes.append(f"{figures['unmarked']} answers could not be marked and count as wrong.")
    if figures.get("too_long"):
        notes.append(f"{figures['too_long']} prompts do not fit the context.")
    notes += [f"{name}: {value:.4g}" for name, value in figures.get("other", {}).items()]
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    groups = _groups("Category", figures.get("by_category", {})) + _groups("Level", figures.get("by_difficulty", {}))
    return f"<h2>{escape(task.name)}</h2>{said}{groups}{_samples(task, right=True)}{_samples(task, right=False)}"


def _groups(title: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
    if len(groups) < 2:
        return ""
    rows = [
        [_cell(value or "–"), _cell(str(group["questions"])), _cell(share_text(group)), _bar(group)]
        for value, group in groups.items()
    ]
    return _rows((title, "Questions", "Accuracy", ""), rows)


def _bar(group: Mapping[str, Any]) -> str:
    """The accuracy as a bar, its interval as a line over it."""
    low, high = (100 * bound for bound in group["interval"])
    value = f'<b style="width:{100 * group["accuracy"]:.1f}%"></b>'
    interval = f'<em style="left:{low:.1f}%;width:{high - low:.1f}%"></em>'
    return f'<td class="bar"><div class="track">{value}{interval}</div></td>'


def _samples(task: TaskResult, *, right: bool) -> str:
    found = [(item, a) for item in task.items for a in item.answers if a.correct == right]
    if not found:
        return ""
    cards = "".join(_card(item, answer) for item, answer in found[:MOST_SAMPLES])
    word = "right" if right else "wrong"
    shown = f"{min(len(found), MOST_SAMPLES)} of {len(found)} {word} answers"
    return f"<details><summary>{shown}</summary>{cards}</details>"


def _card(item: ItemResult, answer: Sample) -> str:
    word = "right" if answer.correct else "wrong"
    facts = f"{item.category} {item.id}, {answer.tokens} tokens, {answer.thinking_tokens} of them thinking".strip()
    said = answer.completion if answer.fits else "(the prompt does not fit the context)"
    parts = (("Question", item.prompt), ("Answer", said), ("Reference", item.reference))
    body = "".join(f"<div><b>{name}</b><pre>{escape(text)}</pre></div>" for name, text in parts)
    return f'<div class="sample {word}"><b class="mark">{word}</b> <small>{escape(facts)}</small>{body}</div>'


def _meanings() -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in MEANINGS)
    return f"<h2>What the columns mean</h2><dl>{listed}</dl>"

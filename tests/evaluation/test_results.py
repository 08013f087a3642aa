"""Figures follow from marked answers, reports come back from JSON, and only equal questions are compared."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.outcome import Report, check_comparable, read_report
from ray_pipeline.evaluation.results import ItemResult, Sample, TaskResult
from ray_pipeline.evaluation.statistics import pass_at_k, wilson_interval
from ray_pipeline.evaluation.tasks import Item, Task
from ray_pipeline.report.evaluation import formats as registry
from ray_pipeline.report.evaluation import get_reporter, known_reporters, reporter
from ray_pipeline.report.evaluation.page import render
from ray_pipeline.report.evaluation.terminal import print_report

UNMARKED = {"finished": False, "score": None}


def said(text: str, *, right: bool, **more: object) -> Sample:
    return Sample(f"<think>{text}</think>{text}", right, float(right), well_formed=True, tokens=10, **more)


def result(name: str = "sums", shift: int = 0) -> TaskResult:
    """Three questions, four answers each."""
    items = [
        ItemResult("a", "1+1?", "2", "easy", 1, [
            said("2", right=True, thinking_tokens=4, answer_tokens=2, steps=1, steps_right=1, recomputes=True),
            said("3", right=False, thinking_tokens=4, answer_tokens=2, steps=2, steps_right=1),
            said("3", right=False), said("2", right=True, steps=1, steps_right=1),
        ]),
        ItemResult("b", "2+2?", "4", "easy", 2, [said("5", right=False, reflects=True), *[said("4", right=True)] * 3]),
        ItemResult("c", "<b>9+9?</b>", "18", "hard", 2, [replace(said("1", right=False), **UNMARKED)] * 4),
    ]  # fmt: skip
    if shift:
        items[0] = replace(items[0], answers=[said("2", right=True)] * 4)
    return TaskResult(name, "answers", items, seconds=2.0, ks=(1, 2, 4))


def report(*tasks: TaskResult, name: str = "toy (sft)") -> Report:
    model = {"name": name, "folder": "/models/toy", "form": "stage", "parameters": 22_000, "device": "cpu"}
    settings = {"samples": 4, "temperature": 0.6, "max_new_tokens": 96, "seed": 0, "tools": []}
    return Report(model, settings, list(tasks or (result(),)), created=1e9)


def test_figures_by_hand() -> None:
    figures = result().figures()
    assert figures["accuracy"] == pytest.approx((2 / 4 + 3 / 4 + 0) / 3)
    assert figures["interval"] == list(wilson_interval(1.25, 3))
    assert figures["by_category"]["easy"] == {
        "questions": 2, "accuracy": 0.625, "interval": list(wilson_interval(1.25, 2))
    }  # fmt: skip
    assert figures["by_difficulty"]["2"]["accuracy"] == pytest.approx(0.375)
    for k in (1, 2, 4):
        expected = (pass_at_k(4, 2, k) + pass_at_k(4, 3, k)) / 3
        assert figures["pass_at_k"][str(k)]["value"] == pytest.approx(expected)
    # Of the first two: a is tied and the first is right; b is tied and the first is wrong. Of four: b has a majority.
    assert {k: f["value"] for k, f in figures["maj_at_k"].items()} == {
        "1": pytest.approx(1 / 3), "2": pytest.approx(1 / 3), "4": pytest.approx(2 / 3)
    }  # fmt: skip
    assert figures["format_rate"] == 1.0 and figures["finished_rate"] == pytest.approx(8 / 12)
    assert figures["unmarked"] == 4 and figures["too_long"] == 0
    assert figures["mean_tokens"] == 10 and figures["tokens_per_second"] == 60
    assert figures["thinking_overhead"] == 2.0 and figures["mean_thinking_tokens"] == pytest.approx(8 / 12)
    assert figures["steps_rate"] == pytest.approx(3 / 12) and figures["steps_right_rate"] == pytest.approx(2 / 12)
    assert figures["verified_rate"] == figures["reflection_rate"] == pytest.approx(1 / 12)


def test_programs_have_no_majority_and_options_no_writing() -> None:
    assert "maj_at_k" not in replace(result(), votes=False).figures()
    figures = replace(result(), way="options").figures()
    assert not {"pass_at_k", "format_rate", "tokens_per_second"} & set(figures) and "accuracy" in figures


def test_no_items_have_no_figures_but_the_harness_own() -> None:
    figures = TaskResult("lm_eval:x", "harness", [], 1.0, other={"x/ppl": 3.5}).figures()
    assert figures == {"questions": 0, "accuracy": 0.0, "interval": [0.0, 1.0], "other": {"x/ppl": 3.5}}


def test_a_report_comes_back_from_json(tmp_path: Path) -> None:
    whole = report(result(), replace(result("more"), way="options", ks=(1,)))
    get_reporter("json")(whole, tmp_path / "r.json")
    again = read_report(tmp_path / "r.json")
    assert again.as_json() == whole.as_json() == json.loads((tmp_path / "r.json").read_text())
    assert set(whole.as_json()) == {"kind", "schema", "created", "model", "settings", "tasks"}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"], "nothing is left beside it"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "damaged"),
        ("[]", "is not a report of `eval`"),
        ('{"kind": "other"}', "is not a report"),
        ('{"kind": "ray_pipeline.evaluation", "schema": 99}', "has schema 99"),
        ('{"kind": "ray_pipeline.evaluation", "schema": 1}', r"damaged \(KeyError\('tasks'\)\)"),
    ],
)
def test_what_is_no_report_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=expected):
        read_report(tmp_path / "r.json")


def test_a_comparison_is_paired_by_question() -> None:
    mine = report(result("x"), result("y", shift=1))
    mine.compare(report(result("x"), result("y"), name="other"))
    assert set(mine.comparison) == {"x", "y", "all tasks"}
    assert (mine.comparison["x"].difference, mine.comparison["x"].p_value) == (0.0, 1.0)
    assert mine.comparison["y"].difference == pytest.approx(0.5 / 3) and mine.comparison["y"].better == 1
    assert mine.comparison["all tasks"].questions == 6
    written = mine.as_json()["comparison"]
    assert written["model"]["name"] == "other" and written["tasks"]["y"]["better"] == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda items: items[:2], "has 3 questions here and 2 there"),
        (lambda items: [replace(items[0], prompt="7+7?"), *items[1:]], "differs at question \"a\": '1\\+1\\?' here"),
        (lambda items: [items[1], items[0], items[2]], 'differs at question "a"'),
        (lambda items: [replace(items[0], reference="3"), *items[1:]], 'differs at question "a"'),
    ],
)
def test_other_questions_are_not_compared(change: object, expected: str) -> None:
    other = result()
    other.items = change(other.items)
    with pytest.raises(UserError, match=expected):
        report().compare(report(other))
    asked = [Item(i.id, i.prompt, i.reference) for i in result().items]
    with pytest.raises(UserError, match=expected):
        check_comparable([Task("sums", asked)], report(other))


def test_files_may_lie_elsewhere_for_the_other() -> None:
    mine = report(result("gsm8k:/here/test.jsonl"))
    mine.compare(report(result("gsm8k:/there/test.jsonl")))
    assert mine.comparison["gsm8k:/here/test.jsonl"].p_value == 1.0
    with pytest.raises(UserError, match="was not asked gsm8k:c"):
        report(result("gsm8k:c")).compare(report(result("gsm8k:a"), result("gsm8k:b")))


def test_a_task_the_other_was_not_asked_is_named() -> None:
    with pytest.raises(UserError, match="was not asked sums, only more"):
        report().compare(report(result("more")))
    with pytest.raises(UserError, match="was not asked logic, only sums"):
        check_comparable([Task("logic", [])], report())


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    mine = report(result("x"), result("y", shift=1))
    mine.compare(report(result("x"), result("y"), name="<other>"))
    page = render(mine)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    text = "".join(parser.text)
    assert "<b>9+9?</b>" in text and "<b>9+9?" not in page, "a model's text is no markup"
    assert "41.7% [" in text and "Against <other>" in text and "pass@4" not in page[: page.index("<main>")]
    assert "no difference shown" in text and "5 of 5 right answers" in text
    assert not any(word in page for word in ("http:", "https:", "<script", "src=", "@import", "url("))


def test_the_terminal_shows_the_same_figures() -> None:
    mine = report(result("x"), result("y", shift=1))
    mine.compare(report(result("x"), result("y"), name="other"))
    out = StringIO()
    print_report(Console(file=out, width=100), mine)
    text = out.getvalue().replace("\N{NO-BREAK SPACE}", " ")
    assert "41.7% [" in text and "maj@4" in text and "against other" in text
    assert "4 answers could not be marked and count as wrong" in text
    assert "x, right: 1+1?" in text and "(right is 2)" in text


def test_names_and_answers_cannot_steer_the_terminal() -> None:
    items = [
        ItemResult(str(i), "[/b] \x1b[2J?", "2", f"[/{i}]", 1, [said("\x1b]0;x\x07", right=False)]) for i in (1, 2)
    ]
    mine = report(TaskResult("[/red]", "answers", items, 1.0), name="[bold]")
    mine.compare(mine)
    out = StringIO()
    print_report(Console(file=out, width=100), mine)
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    assert all(name in out.getvalue() for name in ("[/red]", "[bold]", "[/1]", "[/b]"))


def test_answers_are_written_a_line_each(tmp_path: Path) -> None:
    get_reporter("jsonl")(report(), tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[1]["sample"] == 1 and rows[1]["completion"] == "<think>3</think>3"


def test_a_reporter_registers_by_decorator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REPORTERS", dict(registry._REPORTERS))

    @reporter("short")
    def short(found: Report, path: Path) -> None:
        path.write_text(f"{found.tasks[0].figures()['accuracy']:.3f}")

    get_reporter("short")(report(), tmp_path / "s.txt")
    assert (tmp_path / "s.txt").read_text() == "0.417" and "short" in known_reporters()
    with pytest.raises(UserError, match='did you mean "short"'):
        get_reporter("shrt")


def test_a_reporter_registers_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REPORTERS", dict(registry._REPORTERS))
    (tmp_path / "brings_a_reporter.py").write_text(
        "def write(report, path):\n    path.write_text(report.model['name'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.metadata.EntryPoint("name", "brings_a_reporter:write", registry.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    registry._load.cache_clear()
    get_reporter("name")(report(), tmp_path / "n.txt")
    assert (tmp_path / "n.txt").read_text() == "toy (sft)"
    monkeypatch.undo()
    registry._load.cache_clear()

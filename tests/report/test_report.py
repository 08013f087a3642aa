"""The end table and report.html."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rich.console import Console

from ray_pipeline.dag.ledger import Record, RunFile, begin_record, close_record, read_status
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.report.run_facts import categories, same_questions
from ray_pipeline.report.run_page import write_report
from ray_pipeline.report.summary import baseline_text, figure_text, print_summary, summary_rows

FIGURES = {
    "data_prep": ({"documents": 12.0}, {}, None),
    "pretrain": ({"validation_loss": 1.931}, {"ln_vocab": 6.238, "unigram_entropy": 4.9}, True),
    "sft": ({"accuracy": 0.613}, {"input_accuracy": 0.02}, True),
    "grpo": ({"accuracy": 0.6}, {"input_accuracy": 0.613}, False),
    "distillation": (
        {"accuracy": 0.55, "params": 1.2e6, "teacher_params": 2.61e6},
        {"input_accuracy": 0.1, "teacher_accuracy": 0.6},
        True,
    ),
}


def make_run(run_dir: Path) -> Path:
    """Five finished stages; one learned nothing; export never ran."""
    run = RunFile(run_dir)
    for stage, (metrics, baselines, learned) in FIGURES.items():
        folder = run_dir / f"{stage}-a"
        run.stages[stage] = {"identity": "a", "folder": folder.name, "decides": {}}
        record = begin_record(folder, Record(stage, "a", "running"))
        status = "learned_nothing" if learned is False else "done"
        close_record(folder, record, status, metrics=metrics, baselines=baselines, learned=learned)
    run.save()
    lines = [{"stage": "pretrain", "step": s, "time": 0, "train/loss": 6 / s} for s in range(1, 40)]
    lines.append({"stage": "pretrain", "step": 40, "time": 0, "train/loss": math.nan, "val/validation_loss": 1.931})
    (run_dir / "pretrain-a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"prompt": "2 + 2 = <b>?</b>", "completion": "<think>2 + 2</think>4", "correct": True}
    (run_dir / "sft-a" / "samples.json").write_text(json.dumps([sample]))
    return run_dir


def write_page(run_dir: Path) -> Path:
    return write_report(run_dir, read_status(run_dir))


def test_rows_hold_every_figure_against_its_baseline(tmp_path):
    rows = {row.stage: row for row in summary_rows(read_status(make_run(tmp_path))["stages"], frozenset({"data_prep"}))}
    assert [row.status for row in rows.values()] == ["REUSED", "DONE", "DONE", "LEARNED NOTHING", "DONE", "NOT RUN"]
    assert rows["pretrain"].figure == "validation loss 1.931 nats"
    assert rows["pretrain"].against == "ln V 6.238; unigram entropy 4.900"
    assert rows["sft"].figure == "held-out accuracy 61.3%"
    assert rows["sft"].against == "input 2.0% (+59.3 points)"
    assert rows["grpo"].against == "input 61.3% (-1.3 points)"
    assert rows["distillation"].figure == "held-out accuracy 55.0%, 1.2M parameters"
    assert rows["distillation"].against == "input 10.0% (+45.0 points); teacher 60.0%, 2.61M parameters"


def test_dpo_is_held_against_what_its_input_preferred_and_answered():
    figures = {"preference_accuracy": 0.81, "accuracy": 0.6}
    assert figure_text("dpo", figures) == "held-out preference accuracy 81.0%, held-out accuracy 60.0%"
    bounds = {"preference_accuracy_low": 0.762, "preference_accuracy_high": 0.851}
    assert "preference accuracy 81.0% (76.2% to 85.1%), held-out" in figure_text("dpo", figures | bounds)
    before = {"input_preference_accuracy": 0.5, "input_accuracy": 0.613}
    expected = "input's preference 50.0% (+31.0 points); input 61.3% (-1.3 points)"
    assert baseline_text("dpo", before, figures) == expected


def test_how_evenly_experts_were_used_stands_beside_the_loss():
    figures = {"validation_loss": 1.931, "largest_load": 1.42, "load_entropy": 0.981, "dropped_tokens": 0.0}
    text = figure_text("pretrain", figures)
    experts = "busiest expert 1.4x the mean, load entropy 0.98, 0 tokens dropped"
    assert text == f"validation loss 1.931 nats; {experts}"


def test_the_loss_of_each_source_stands_beside_that_of_the_whole(tmp_path):
    figures = {"validation_loss": 1.931, "validation_loss/builtin": 1.5, "validation_loss/sea": 2.25}
    assert figure_text("pretrain", figures) == "validation loss 1.931 nats (builtin 1.500, sea 2.250)"
    many = {f"validation_loss/{i}": float(i) for i in range(8)}
    assert figure_text("pretrain", figures | many).endswith("2 2.000, 3 3.000, and 4 more)")
    run_dir = make_run(tmp_path)
    with (run_dir / "pretrain-a" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"stage": "pretrain", "step": 40, "time": 0, "val/validation_loss/sea": 2.25}) + "\n")
    assert "validation loss/sea" in write_page(run_dir).read_text()


def test_reused_stage_that_learned_nothing_still_says_so(tmp_path):
    rows = summary_rows(read_status(make_run(tmp_path))["stages"], frozenset({"grpo"}))
    assert rows[3].status == "LEARNED NOTHING"


def test_printed_table_names_the_outputs(tmp_path):
    out = io.StringIO()
    rows = summary_rows(read_status(make_run(tmp_path))["stages"])
    print_summary(Console(file=out, width=160), rows, tmp_path)
    assert "sft-a" in out.getvalue()
    assert f"Outputs are in {tmp_path}" in out.getvalue()


class Page(HTMLParser):
    """Every tag, and what each closes."""

    VOID = frozenset({"meta", "i", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def drawings(text: str) -> dict[str, Any]:
    """The block of JSON that scripts draw."""
    found = re.findall(r'<script type="application/json" id="drawings">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_page_is_whole_and_needs_nothing_from_outside(tmp_path):
    text = write_page(make_run(tmp_path)).read_text()
    page = Page(text)
    assert page.open == []
    assert page.links == ["https://github.com/leeoniya/uPlot"], "named at the foot, loaded from nowhere"
    assert page.tags.count("script") == 2 and "link" not in page.tags
    assert "@import" not in text and "url(" not in text
    [loss] = [chart for chart in drawings(text)["stages"][1]["charts"] if chart["title"] == "Loss"]
    assert [one["name"] for one in loss["series"]] == ["loss", "validation loss"]
    assert loss["x"] == list(range(1, 41)) and loss["series"][0]["values"][-1] is None, "no number is no point"
    assert [level["name"] for level in loss["levels"]] == ["ln vocab", "unigram entropy"]


def test_page_shows_figures_and_escaped_answers(tmp_path):
    text = write_page(make_run(tmp_path)).read_text()
    assert "LEARNED NOTHING" in text
    assert "unigram entropy" in text
    assert "&lt;think&gt;2 + 2&lt;/think&gt;4" in text
    assert "<b>?</b>" not in text


def test_no_text_of_a_run_ends_a_script_or_becomes_one(tmp_path):
    run_dir, evil = make_run(tmp_path), "</script><script>alert(1)</script><!--"
    sample = {"prompt": evil, "completion": evil, "correct": False}
    (run_dir / "grpo-a" / "samples.json").write_text(json.dumps([sample]))
    line = {"stage": "grpo", "step": 1, "time": 0, f"val/validation_loss/{evil}": 1.0, f"grpo/{evil}_reward": 2.0}
    (run_dir / "grpo-a" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = write_page(run_dir).read_text()
    assert Page(text).tags.count("script") == 2 and "alert(1)</script>" not in text
    named = {one["name"] for chart in drawings(text)["stages"][3]["charts"] for one in chart["series"]}
    assert named == {f"validation loss/{evil}", f"{evil} reward"}


def test_same_questions_stand_once_with_the_answers_of_every_stage(tmp_path):
    run_dir = make_run(tmp_path)
    for stage, correct in (("sft", False), ("grpo", True)):
        sample = {"prompt": "2 + 2 = ?", "completion": f"{stage} says", "answer": "4", "correct": correct}
        write_sealed(run_dir / f"{stage}-a" / "samples.json", {"samples": [sample]})
    before = {"accuracy": 0.0, "interval": [0.0, 0.2], "questions": 1}
    shown = [{"prompt": "2 + 2 = ?", "completion": "never seen", "answer": "4", "correct": False}]
    write_sealed(run_dir / "sft-a" / "input.json", before | {"shown": shown})
    write_sealed(run_dir / "sft-a" / "heldout.json", before | {"accuracy": 0.5, "by_category": {"sums": before}})
    entries = read_status(run_dir)["stages"]
    [question] = same_questions(entries)
    assert [one["by"] for one in question["said"]] == ["before sft", "after sft", "after grpo"]
    assert [one["correct"] for one in question["said"]] == [False, False, True]
    [part] = categories(entries)
    assert [row["name"] for row in part["rows"]] == ["all", "sums"]
    assert part["rows"][0]["before"]["accuracy"] == 0.0 and part["rows"][1]["before"] is None
    assert "sft says" in write_page(run_dir).read_text()


def test_failed_stage_shows_its_error(tmp_path):
    make_run(tmp_path)
    folder = tmp_path / "sft-a"
    close_record(folder, begin_record(folder, Record("sft", "a", "running")), "failed", error="rank 1: a <bug>")
    assert "rank 1: a &lt;bug&gt;" in write_page(tmp_path).read_text()


def test_counts_and_export_checks_read_well():
    assert figure_text("data_prep", {"documents": 400.0, "tokens": 67290.0}) == "documents 400, tokens 67,290"
    checks = {"hf/greedy_agreement": 1.0, "model-q8_0.gguf/greedy_agreement": 0.9}
    assert figure_text("export", checks) == "2 exports checked, GGUF greedy agreement 90.0% or more"
    assert figure_text("data_prep", {"tokens": float("nan")}) == "tokens nan"
    lost = {"documents": 400.0, "duplicates": 2.0, "contaminated": 0.0, "preference_pairs_too_long": 1224.0}
    expected = "documents 400, duplicates 2, contaminated 0; left out: 2 duplicates, 1,224 preference pairs too long"
    assert figure_text("data_prep", lost) == expected
    assert figure_text("data_prep", {"unigram_entropy": 3.78123}) == "unigram entropy 3.781"
    lost = {"documents": 400.0, "rows": 7.0, "tokens": 9.0, "documents_left_out": 31.0, "files_left_out": 0.0}
    assert figure_text("data_prep", lost) == "documents 400, rows 7, tokens 9; left out: 31 documents"


def test_weights_that_were_given_are_among_what_pretraining_is_held_against():
    text = baseline_text("pretrain", {"ln_vocab": 6.24, "input_loss": 1.5}, {"validation_loss": 1.25})
    assert text == "ln V 6.240; input 1.500"


def test_a_predicted_loss_is_held_against_what_was_reached():
    text = baseline_text("pretrain", {"ln_vocab": 6.24, "predicted_loss": 2.0}, {"validation_loss": 1.97})
    assert text == "ln V 6.240; predicted 2.000 (-1.5%)"
    text = baseline_text("pretrain", {"ln_vocab": 6.24, "predicted_loss_elsewhere": 2.0}, {"validation_loss": 1.97})
    assert text == "ln V 6.240; no verdict on the predicted 2.000: it is of another text"


def test_sft_shows_its_loss_beside_its_answers():
    metrics, baselines = {"accuracy": 0.613, "validation_loss": 0.5}, {"input_accuracy": 0.02, "input_loss": 2.25}
    assert figure_text("sft", metrics) == "held-out accuracy 61.3%, loss 0.500 nats"
    assert baseline_text("sft", baselines, metrics) == "input's loss 2.250; input 2.0% (+59.3 points)"


def test_an_export_without_gguf_says_how_many_files_were_checked():
    assert figure_text("export", {"hf/x": 1.0, "checks_passed": 2.0, "checks_not_run": 0.0}) == "2 exports checked"

"""What is printed about layouts."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from ray_pipeline.layout.layout import Layout
from ray_pipeline.verification.cases import TOLERANCES, Case, every_layout, small_subject
from ray_pipeline.verification.compare import Comparison, Result
from ray_pipeline.verification.tally import (
    Tally,
    heading,
    print_refused,
    print_steps,
    print_summary,
    print_table,
    rerun_command,
)

LAYOUT = Layout(gpus=2, pp=2, zero_stage=1)
GOOD = Comparison([(2.0, 2.0)], [(1.0, 1.0)], 1e-7, 2e-7, 3e-7, "layers.0.norm", 0, 99)


def result(compared: Comparison | None = GOOD, wrong: tuple[str, ...] = (), error: str = "", **options: str) -> Result:
    case = Case(small_subject(LAYOUT), LAYOUT, **options)  # type: ignore[arg-type]
    return Result(case, 3.0, compared, error, list(wrong))


def page() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=110), text


def test_a_fail_says_what_is_wrong_and_how_to_see_it_again() -> None:
    console, text = page()
    failed = result(replace(GOOD, loss=1e-3), wrong=("loss differs",), precision="bf16")
    print_steps(console, failed, TOLERANCES["bf16"])
    assert "FAIL pp=2 ZeRO=1 bf16 adamw (3 s)\n  loss differs\n" in text.getvalue()
    assert "again: verify-parallel --gpus 2 --pp-size 2 --zero-stage 1 --precision bf16" in text.getvalue()


def test_a_layout_that_did_not_run_has_its_error_and_no_figures() -> None:
    console, text = page()
    print_steps(console, result(None, error="rank 1: died"), TOLERANCES["fp32"])
    print_table(console, [result(None, error="rank 1: died")])
    assert "  rank 1: died" in text.getvalue()
    assert "largest" not in text.getvalue()


def test_the_command_to_repeat_names_what_is_not_the_default() -> None:
    assert rerun_command(result()) == "verify-parallel --gpus 2 --pp-size 2 --zero-stage 1"
    assert rerun_command(result(optimizer="sgd")).endswith("--zero-stage 1 --optimizer sgd")


def test_the_table_has_one_line_per_layout_and_a_title_per_precision() -> None:
    console, text = page()
    print_table(console, [result(), result(precision="bf16"), result(wrong=("loss",))])
    lines = text.getvalue().splitlines()
    assert sum("pp=2 ZeRO=1" in line for line in lines) == 3
    titles = [line.strip() for line in lines if line.strip().endswith("adamw")]
    assert titles == ["fp32 adamw", "bf16 adamw"]
    assert sum(line.rstrip().endswith("PASS") for line in lines) == 2
    assert "…" not in text.getvalue()


def test_progress_tells_rate_and_time_left() -> None:
    console, text = page()
    with Tally(console, 4, plain_every=0.0) as tally:
        tally.add(result())
        assert tally.text().startswith("1/4  ")
        assert "/s  " in tally.text() and " left  0 FAIL" in tally.text()
        tally.add(result(wrong=("loss",)))
    assert "layouts: 2/4  " in text.getvalue() and "1 FAIL" in text.getvalue()


def test_the_summary_counts_what_passed_failed_and_was_not_reached() -> None:
    for results, total, expected in (
        ([result(), result()], 2, "PASS: 2 of 2 pass (5 s)"),
        ([result(), result(wrong=("loss",))], 2, "1 FAIL: 1 of 2 pass (5 s)"),
        ([result()], 3, "STOPPED: 1 of 3 pass, 2 not verified (5 s)"),
    ):
        console, text = page()
        print_summary(console, results, total, 5.0)
        assert text.getvalue().splitlines()[-1] == expected


def test_refused_layouts_are_grouped_by_rule_with_a_reason() -> None:
    console, text = page()
    refused = every_layout(4).refused
    print_refused(console, refused)
    shown = text.getvalue()
    for rule, found in refused.items():
        assert f"  {rule}: {len(found)}\n" in shown
    assert shown.count("\n") < 30


def test_the_heading_names_ranks_backend_and_model() -> None:
    cases = [Case(small_subject(layout), layout) for layout in (LAYOUT, Layout(gpus=2, pp=2, schedule="zbv"))]
    assert heading(cases).startswith("2 CPU ranks over gloo against one process: 3 to 5 layers, width 32, 8 experts")

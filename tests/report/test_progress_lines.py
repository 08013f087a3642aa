"""Bars on a terminal, throttled plain lines elsewhere."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from ray_pipeline.report.progress_lines import ProgressLines


def test_plain_lines_are_throttled_except_now_and_name_what_they_are_of() -> None:
    out = StringIO()
    with ProgressLines(Console(file=out, width=20), plain_every=3600) as lines:
        lines.wait("later")
        lines.start("[b]", "started")
        for done in range(5):
            lines.show("[b]", f"{done} of 5", done, 5)
        lines.show("[b]", "5 of 5 and a text that is wider than the console", 5, 5, now=True)
        lines.finish("[b]", "DONE")
    shown = ["started", "0 of 5", "5 of 5 and a text that is wider than the console", "DONE"]
    assert out.getvalue().splitlines() == [f"[b]: {text}" for text in shown]


def test_a_terminal_has_one_line_for_each_name_and_a_bar_for_what_runs() -> None:
    out = StringIO()
    with ProgressLines(Console(file=out, width=100, force_terminal=True)) as lines:
        for name in ("[b]", "second", "third"):
            lines.wait(name)
        lines.start("[b]", "started", 4)
        lines.finish("[b]", "DONE in 3 s")
        lines.start("second", "first try")
        lines.start("second", "started", 4)
        lines.show("second", "2 of 4", 2, 4)
        lines.say("second: told at once")
    last = out.getvalue().rpartition("[b]")[2]  # the last frame
    assert last.count("DONE in 3 s") == last.count("2 of 4") == last.count("waiting") == 1
    assert "━" in last and "first try" not in last
    assert out.getvalue().count("told at once") == 1

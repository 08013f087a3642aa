"""The progress file and the lines shown from it."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from ray_pipeline.dag.progress_view import ProgressView
from ray_pipeline.records import progress as progress_module
from ray_pipeline.records.event_log import recorded
from ray_pipeline.records.progress import Progress, progress_text, read_progress


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=200), out


def test_progress_file_tells_step_loss_speed_and_phase(tmp_path):
    progress = Progress(tmp_path, "sft", 10)
    assert read_progress(tmp_path)["phase"] == "starting"
    progress.update(9, loss=2.0, tokens_per_second=100.0)
    progress.update(10, loss=1.5, tokens_per_second=200.0)
    state = read_progress(tmp_path)
    assert (state["stage"], state["step"], state["steps"], state["loss"]) == ("sft", 10, 10, 1.5)
    assert state["seconds_left"] == 0
    progress.phase("evaluating", 3, 7)
    assert read_progress(tmp_path)["phase"] == "evaluating"
    assert progress_text(read_progress(tmp_path)).endswith("evaluating 3/7")


def test_losses_of_layers_stand_beside_the_main_one(tmp_path):
    progress = Progress(tmp_path, "pretrain", 10)
    progress.update(10, loss=2.0, layer_losses={"aux_loss": 1.25, "indexer_kl": 0.125})
    assert "loss 2  aux loss 1.25  indexer kl 0.125" in progress_text(read_progress(tmp_path))


def test_time_left_counts_from_the_step_a_resume_started_at(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 10.0, 10.0, 10.0, 20.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr("ray_pipeline.records.progress.time.monotonic", lambda: next(clock))
    progress = Progress(tmp_path, "sft", 200)
    progress.update(100)
    assert progress.state["seconds_left"] is None
    progress.update(110)
    assert progress.state["seconds_left"] == 90.0


def test_missing_or_torn_file_reads_as_nothing(tmp_path):
    assert read_progress(tmp_path) is None
    (tmp_path / "progress.json").write_text('{"stage": ')
    assert read_progress(tmp_path) is None


def test_plain_output_has_one_throttled_line_per_change(tmp_path):
    console, out = plain_console()
    with ProgressView(console, {"sft": tmp_path}, plain_every=3600) as view:
        view.start("sft")
        progress = Progress(tmp_path, "sft", 4)
        for step in range(1, 5):
            progress.update(step, loss=1.0 / step)
            view.refresh()
        view.finish("sft", "DONE in 3 s")
    lines = out.getvalue().splitlines()
    assert lines[0] == "sft: started"
    assert lines[1].startswith("sft: step ")
    assert lines[2] == "sft: DONE in 3 s"
    assert len(lines) == 3


def test_terminal_shows_every_stage_on_its_own_line(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with ProgressView(console, {"sft": tmp_path / "sft", "grpo": tmp_path / "grpo"}) as view:
        view.start("sft")
        Progress(tmp_path / "sft", "sft", 4).update(4, loss=0.25, tokens_per_second=1234.0)
        view.refresh()
    text = out.getvalue()
    assert "step 4/4  loss 0.25  1,234 tokens/s" in text
    assert "waiting" in text


def test_warnings_of_ranks_reach_the_terminal_once_and_what_they_print_does_not(tmp_path):
    console, out = plain_console()
    with ProgressView(console, {"sft": tmp_path}) as view:
        view.start("sft")
        for rank in (0, 1):
            with recorded(tmp_path, f"rank-{rank}"):
                logging.getLogger("ray_pipeline.tests").warning("the rate is odd")
                print("a word of a library")
        view.refresh()
        view.finish("sft", "DONE in 3 s")
    assert out.getvalue().splitlines() == ["sft: started", "sft: the rate is odd", "sft: DONE in 3 s"]


def test_a_phase_in_bytes_shows_sizes_rate_and_time_left(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = Progress(tmp_path, "data_prep", 0)
    progress.phase("reading", 0, 500_000_000, "bytes")
    assert progress_text(progress.state) == "reading 0 B of 500 MB"
    now[0] += 20
    progress.phase("reading", 100_000_000, 500_000_000, "bytes")
    assert progress_text(progress.state) == "reading 100 MB of 500 MB  5 MB/s  1 min 20 s left"
    progress.phase("conversations", 3, 4)
    assert progress_text(progress.state) == "conversations 3/4"

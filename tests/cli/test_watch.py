"""`watch` and `logs`, on a run's folder that the writers of a real one have filled."""

from __future__ import annotations

import asyncio
import html
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ray_pipeline.cli.group import main
from ray_pipeline.dag.ledger import Record, RunFile, begin_record, close_record
from ray_pipeline.launch.rank_errors import RankStatus
from ray_pipeline.records.artifacts import write_sealed, write_text
from ray_pipeline.records.event_log import recorded
from ray_pipeline.records.guard_file import add_intervention
from ray_pipeline.records.metrics_file import MetricsFile
from ray_pipeline.records.progress import Progress
from ray_pipeline.settings.loading import config_yaml
from ray_pipeline.settings.run_folder import CONFIG_FILE, SAMPLES_FILE, stage_folder
from ray_pipeline.settings.schema import CostConfig, PipelineFields

IDENTITIES = {"data_prep": "a" * 64, "pretrain": "b" * 64, "grpo": "c" * 64}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two stages done, GRPO at step 24 of 40 on two ranks."""
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    run = RunFile(folder)
    run.chain = [*IDENTITIES, "export"]
    for stage, identity in IDENTITIES.items():
        run.stages[stage] = {"identity": identity, "folder": stage_folder(folder, stage, identity).name, "decides": {}}
    run.save()
    config = PipelineFields(output_dir=folder.parent, run_name="demo", cost=CostConfig(usd_per_gpu_hour=2.0))
    write_text(folder / CONFIG_FILE, config_yaml(config))
    for stage in ("data_prep", "pretrain"):
        work = stage_folder(folder, stage, IDENTITIES[stage])
        work.mkdir()
        record = begin_record(work, Record(stage, IDENTITIES[stage], "running"))
        close_record(work, record, "done", metrics={"validation_loss": 1.93} if stage == "pretrain" else {})
    grpo_at_work(stage_folder(folder, "grpo", IDENTITIES["grpo"]))
    return folder


def grpo_at_work(work: Path) -> None:
    work.mkdir()
    begin_record(work, Record("grpo", IDENTITIES["grpo"], "running", ranks=2))
    lines = MetricsFile(work, "grpo")
    for step in range(1, 25):
        figures: dict[str, Any] = {"train/loss": 1 / step, "train/grad_norm": 1.0, "perf/tokens_per_second": 900.0}
        figures |= {"grpo/reward": step / 24, "memory/rank_0_gb": 1.2, "memory/rank_1_gb": 0.8}
        lines.log(step, figures | {"moe/layers.1/load": [0, 10, 20, 10], "system/cpu_percent": 50.0})
    lines.log(24, {"val/accuracy": 0.615})
    progress = Progress(work, "grpo", 40)
    progress._written = 0.0  # it writes at most every 0.3 s
    progress.update(24, loss=0.04, tokens_per_second=900.0)
    shown = {"prompt": "What is 47+38?", "completion": "47+38 = 85", "answer": "85", "correct": True}
    write_sealed(work / SAMPLES_FILE, {"samples": [shown]})
    add_intervention(work, step=9, guard="loss spike", policy="rewind", text="it rose", skipped=[9], back_to=8)
    for rank in (0, 1):
        with recorded(work, f"rank-{rank}"):
            RankStatus(work, rank, {"pp": rank, "dp": 0, "sp": 0, "tp": 0}, "grpo").at("sampling", 25)
            logging.getLogger("ray_pipeline.tests").warning("rank %d says so", rank)
            print(f"printed by {rank}")


def logs(run_dir: Path, *flags: str) -> int:
    return main(["logs", "demo", "--output-dir", str(run_dir.parent), *flags])


def test_logs_of_all_ranks_of_one_and_of_a_level(run_dir, capsys):
    assert logs(run_dir) == 0
    everything = capsys.readouterr().out
    assert all(text in everything for text in ("rank 0 says so", "rank 1 says so", "printed by 1"))
    logs(run_dir, "--rank", "1")
    assert "rank 0" not in capsys.readouterr().out
    logs(run_dir, "--level", "warning")
    assert "printed" not in capsys.readouterr().out
    logs(run_dir, "--rank", "7")
    assert "nothing at level info or above from rank 7 yet" in capsys.readouterr().out


def test_logs_of_a_stage_that_has_not_begun_are_refused(run_dir, capsys):
    assert logs(run_dir, "--stage", "export") == 2
    assert "run demo: export has not begun, so nothing was logged yet." in capsys.readouterr().err


def test_logs_are_followed_as_they_come_until_ctrl_c(run_dir):
    work = stage_folder(run_dir, "grpo", IDENTITIES["grpo"])
    command = ["logs", "demo", "--follow", "--rank", "1", "--output-dir", str(run_dir.parent)]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "ray_pipeline.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below `nohup ... &`
    ) as child:  # fmt: skip
        try:
            assert child.stdout is not None
            assert "rank 1 says so" in child.stdout.readline() and "printed by 1" in child.stdout.readline()
            for rank in (0, 1):
                with recorded(work, f"rank-{rank}"):
                    print(f"later by {rank}")
            assert "later by 1" in child.stdout.readline()
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130 and "Traceback" not in errors


def test_status_says_what_guards_did_and_what_was_spent(run_dir, capsys):
    assert main(["status", "demo", "--output-dir", str(run_dir.parent)]) == 0
    said = capsys.readouterr().out
    assert "grpo: step 9: loss spike (rewind): it rose; went back to step 8; skipped step 9" in said
    assert "spent so far: $" in said and "at $2.00 a GPU hour (cost.usd_per_gpu_hour)" in said


def test_watch_without_textual_is_refused_with_the_extra(run_dir, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["watch", "demo", "--output-dir", str(run_dir.parent)]) == 2
    assert "pip install 'ray-pipeline[watch]'" in capsys.readouterr().err


def test_a_run_in_a_bucket_is_watched_by_its_address(run_dir, tmp_path, capsys):
    pytest.importorskip("textual")
    fsspec.core.url_to_fs("memory://")[0].put(str(run_dir), "/runs/demo", recursive=True)
    picture = tmp_path / "watch.svg"
    assert main(["watch", "memory://runs/demo", "--screenshot", str(picture)]) == 0
    text = html.unescape(picture.read_text()).replace("\xa0", " ")
    assert all(shown in text for shown in ("memory://runs/demo", "running", "step 24/40", "rank 1 says so", "0.80 GB"))
    assert main(["watch", "memory://runs", "--screenshot", str(picture)]) == 2
    assert "memory://runs: holds no run" in capsys.readouterr().err


def text_of(app: Any) -> str:
    """Everything on the screen."""
    lines = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in lines)


def test_the_dashboard_shows_the_stage_at_work_follows_it_and_ends_with_q(run_dir):
    pytest.importorskip("textual")
    from ray_pipeline.cli.dashboard import Dashboard

    async def drive() -> None:
        app = Dashboard(run_dir)
        async with app.run_test(size=(140, 44)) as pilot:
            await pilot.pause()
            shown = text_of(app)
            wanted = (
                "validation loss 1.93",
                "step 24/40",
                "What is 47+38?",
                "rank 1",
                "0.80 GB",
                "layers.1",
                "sampling",
            )
            for text in (*wanted, "busiest 2.00x", "loss spike (rewind)", "rank 0 says so", "held-out"):
                assert text in shown, f"{text}\n{shown}"
            work = stage_folder(run_dir, "grpo", IDENTITIES["grpo"])
            MetricsFile(work, "grpo", resume_step=24).log(25, {"train/loss": 0.0123})
            app.look()
            await pilot.pause()
            assert "0.0123" in text_of(app)
            await pilot.press("q")
        assert app.return_code == 0

    asyncio.run(drive())


@pytest.mark.slow
def test_the_dashboard_in_a_pseudo_terminal(run_dir):
    pytest.importorskip("textual")
    pexpect = pytest.importorskip("pexpect")
    arguments = ["-m", "ray_pipeline.cli", "watch", "demo", "--output-dir", str(run_dir.parent)]
    child = pexpect.spawn(sys.executable, arguments, dimensions=(44, 140), timeout=60, encoding="utf-8")
    child.expect("grpo")
    child.expect("47")
    child.send("q")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0

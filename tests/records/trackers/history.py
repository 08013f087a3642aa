"""One life of a process that tracks a stage, and what each tracker's files hold afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SESSION = """
import os, sys, time
from pathlib import Path
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.metrics_file import MetricsFile
from ray_pipeline.records.trackers.tracker import Ending, TrackedRun
from ray_pipeline.records.trackers.tracking import Tracking
from ray_pipeline.settings.schema import TrackingConfig

folder, name, resume, first, last, kill = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
settings = TrackingConfig(**{"wandb": False, name: True})
config = {"sft": {"steps": 8}, "commit": "c0"}
made_from = {"pretrain": "d1" * 32}
run = TrackedRun(folder, "sft", "run-1-sft-abc", "abc123", "run-1", "tests", None, config, made_from, lambda: 0.25)
tracking = Tracking(settings, run).start()
lines = MetricsFile(folder, "sft", resume_step=resume)
for step in range(first, last + 1):
    lines.log(step, {"train/loss": 1.0 / step, "moe/layers.1/load": [step, 2, 3]})
    lines.log(step, {"val/accuracy": step / 10})
if kill:
    (follower,) = tracking.followers
    while follower.sent is None or min(follower.sent.values()) < last:
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(os.getpid(), 9)
lines.close()
shown = {"prompt": "2 + 2", "completion": "5", "answer": "4", "correct": False}
write_sealed(folder / "samples.json", {"samples": [shown]})
(folder / "model").mkdir(exist_ok=True)
(folder / "model" / "weights").write_text("w" * 1000)
figures, outputs = {"accuracy": 1.0, "params": 7.0}, {"model": folder / "model"}
tracking.finish(Ending("LEARNED NOTHING", 1, "not better", figures, outputs, "e5" * 32))
assert not tracking.followers[0].failed
"""


def session(folder: Path, name: str, resume: int, first: int, last: int, *, kill: bool = False, **env: str) -> None:
    """Log steps `first` to `last` after a resume at `resume`, and end well or by kill -9."""
    done = session_in(folder, name, resume, first, last, kill=kill, **env)
    assert done.returncode == (-9 if kill else 0), done.stderr


def in_namespace() -> list[str]:
    """What begins a command whose mounts nobody else sees."""
    return ["unshare", *([] if os.getuid() == 0 else ["--map-root-user", "--user"]), "--mount"]


def session_in(
    folder: Path, name: str, resume: int, first: int, last: int, *, kill: bool = False, before: Sequence[str] = (),
    **env: str,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """As `session`, however it ends; `before` begins the command."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW", "TRACKIO"))}
    places = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*before, sys.executable, "-c", SESSION, str(folder), name, *map(str, (resume, first, last, int(kill)))],
        env=clean | places | env, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """Every record of the offline run files, oldest file first."""
    out = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        out += [json.loads(line) for line in text.splitlines() if line.strip()]
    return out


def wandb_history(folder: Path) -> dict[str, list[int]]:
    rows = [record["history"]["item"] for record in wandb_records(folder) if record["type"] == "history"]
    return {name: [row["step"] for row in rows if name in row] for name in ("train/loss", "val/accuracy")}


def tensorboard_history(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("moe/layers.1/load")] == [
        event.step for event in events.Scalars("train/loss")
    ]
    return {name: [event.step for event in events.Scalars(name)] for name in ("train/loss", "val/accuracy")}


def mlflow_history(folder: Path) -> dict[str, list[int]]:
    """From the files themselves: a line is time, value, step."""
    (runs,) = [path.parent for path in (folder.parents[1] / "mlruns").glob("*/*/meta.yaml")]
    found = {name: (runs / "metrics" / name).read_text().splitlines() for name in ("train/loss", "val/accuracy")}
    return {name: [int(line.split()[2]) for line in lines] for name, lines in found.items()}


def trackio_history(folder: Path) -> dict[str, list[int]]:
    import sqlite3

    (database,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by rowid").fetchall()
    return {
        name: [step for step, text in rows if name in (text.decode() if isinstance(text, bytes) else text)]
        for name in ("train/loss", "val/accuracy")
    }


HISTORIES = {
    "wandb": wandb_history, "tensorboard": tensorboard_history, "mlflow": mlflow_history, "trackio": trackio_history,
}  # fmt: skip

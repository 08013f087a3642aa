"""Run the real command line in a process of its own, and read what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ray_pipeline.dag.ledger import read_status

TOY = Path(__file__).with_name("toy.yaml")


def start(*arguments: str, folder: Path) -> subprocess.Popen:
    """`ray_pipeline.cli ARGUMENTS --output-dir folder`, output to a file beside the runs."""
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "output.log").open("a")
    command = [sys.executable, "-m", "ray_pipeline.cli", *arguments, "--output-dir", str(folder)]
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def finish(process: subprocess.Popen, folder: Path) -> int:
    """Wait for the end; the log is part of any failure's message."""
    code = process.wait(timeout=600)
    # A toy may learn nothing: that is exit code 1, and a finished run all the same.
    assert code in (0, 1), f"exit code {code}\n{(folder / 'output.log').read_text()[-6000:]}"
    return code


def stages(folder: Path, run: str) -> dict[str, dict]:
    """Status entries by stage."""
    return {entry["stage"]: entry for entry in read_status(folder / run)["stages"]}


def digests(folder: Path, run: str) -> dict[str, str]:
    """Weights digest of every training stage."""
    return {name: s["weights_digest"] for name, s in stages(folder, run).items() if s.get("weights_digest")}


def wait_until_stage_works(process: subprocess.Popen, folder: Path, run: str, stage: str, step: int = 1) -> None:
    """Until the stage reports progress (and has taken `step` steps, where it counts them)."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for path in (folder / run).glob(f"{stage}-*/progress.json"):
            try:
                if json.loads(path.read_text()).get("step", 0) >= step:
                    return
            except (json.JSONDecodeError, FileNotFoundError):
                pass
        assert process.poll() is None, (folder / "output.log").read_text()[-6000:]
        time.sleep(0.05)
    raise AssertionError(f"{stage} did not get to step {step}")


def kill(process: subprocess.Popen) -> None:
    """kill -9 of the driver alone; Ray and the workers find out for themselves."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

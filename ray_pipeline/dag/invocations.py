"""How a run was called: what was typed, when, on which machine and with which versions, in invocations.json."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError, command
from ray_pipeline.hardware import gpus, machine, memory_gib, num_cpus, versions
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import read_sealed
from ray_pipeline.settings.run_folder import INVOCATIONS_FILE

MOST = 50  # that are kept: the first, and the last ones


def read_invocations(run_dir: Path) -> list[dict[str, Any]]:
    """Oldest first; none of a run of an older version, or where the file is damaged: nothing depends on it."""
    path = run_dir / INVOCATIONS_FILE
    try:
        return list(read_sealed(path, "")["invocations"]) if path.exists() else []
    except UserError:
        return []


def note_invocation(run_dir: Path) -> None:
    """Add the one that goes on now."""
    known = read_invocations(run_dir)
    kept = known if len(known) < MOST else [known[0], *known[-MOST + 2 :]]
    write_sealed(run_dir / INVOCATIONS_FILE, {"invocations": [*kept, _this_one()]})


def commit() -> str | None:
    """The commit of this source; None where it is installed, or git is not there."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _this_one() -> dict[str, Any]:
    own = Path(sys.argv[0]).name in ("__main__.py", "ray-pipeline")
    return {
        "time": time.time(),
        "command": command(*sys.argv[1:]) if own else None,  # None: called from Python
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "commit": commit(),
        "machine": machine(),
        "cpus": num_cpus(),
        "memory_gib": round(memory_gib()[0], 1),
        "gpus": [gpu.name for gpu in gpus()],
        "versions": {name: version for name, version in versions().items() if version},
    }

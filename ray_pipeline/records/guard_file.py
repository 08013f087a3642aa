"""What guards did in a stage's training, in guards.json of its folder: rank 0 writes, everybody reads.

The steps whose batches are skipped decide the weights, so the file is durable, and a resumed run skips the same.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import read_sealed
from ray_pipeline.settings.run_folder import GUARDS_FILE

WAY_OUT = "Delete it and resume: guards then know nothing of what they did before."


def read_interventions(folder: Path) -> list[dict[str, Any]]:
    """In the order they happened: `time`, `step`, `guard`, `policy`, `text`, `skipped`, and `back_to` of a rewind.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / GUARDS_FILE
    return list(read_sealed(path, WAY_OUT)["interventions"]) if path.exists() else []


def add_intervention(folder: Path, **values: Any) -> None:
    """Write one more, durably."""
    known = read_interventions(folder)
    write_sealed(folder / GUARDS_FILE, {"interventions": [*known, {"time": time.time(), **values}]})


def interventions_text(interventions: list[dict[str, Any]]) -> list[str]:
    """`step 40: loss spike: ...; went back to step 30, skipped steps 39, 40`, one each."""
    out = []
    for event in interventions:
        done = f"; went back to step {event['back_to']}" if event.get("back_to") is not None else ""
        skipped = f"; skipped step {', '.join(map(str, event['skipped']))}" if event.get("skipped") else ""
        out.append(f"step {event['step']}: {event['guard']} ({event['policy']}): {event['text']}{done}{skipped}")
    return out

"""One recorded step of a stage (`timeline.json`) as the page draws it, and the pipeline's bubble in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.settings.run_folder import TIMELINE_FILE

COMPUTES = ("F", "B", "I", "W")  # kinds of a schedule's actions; what is between them is the bubble


def step_picture(folder: Path) -> dict[str, Any] | None:
    """What ranks did in one step; None where none was recorded, or the file is damaged: it decides nothing.

    Returns:
        `step`, `schedule`, `of` (ranks there are), `bubble` (mean share of the time between the first action of any
        rank and the last one in which a rank computes nothing), `milliseconds` of that time, `data_milliseconds` (the
        longest wait for the batch), and `ranks`: `name`, `bubble` and `spans` [kind, start, end in milliseconds].
    """
    try:
        stored = json.loads((folder / TIMELINE_FILE).read_text(encoding="utf-8"))
        return _picture(stored)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _picture(stored: Mapping[str, Any]) -> dict[str, Any] | None:
    ranks = stored["ranks"]
    actions = [(start, end) for rank in ranks for name, start, end in rank["spans"] if name in COMPUTES]
    if not actions:
        return None
    first, last = min(start for start, _ in actions), max(end for _, end in actions)
    shown = [_rank(index, rank, first, last) for index, rank in enumerate(ranks)]
    data = [end - start for rank in ranks for name, start, end in rank["spans"] if name == "next batch"]
    return {
        "step": stored["step"],
        "schedule": stored["schedule"],
        "of": stored["of"],
        "milliseconds": round(1000 * (last - first), 2),
        "bubble": sum(rank["bubble"] for rank in shown) / len(shown),
        "data_milliseconds": round(1000 * max(data, default=0.0), 2),
        "ranks": shown,
    }


def _rank(index: int, rank: Mapping[str, Any], first: float, last: float) -> dict[str, Any]:
    place = rank["place"]
    spans: Sequence[Sequence[Any]] = rank["spans"]
    busy = sum(end - start for name, start, end in spans if name in COMPUTES)
    return {
        "name": f"rank {index}",
        "place": " ".join(f"{axis}={place[axis]}" for axis in ("pp", "dp", "sp", "tp")),
        "bubble": round(1 - busy / max(last - first, 1e-9), 4),
        "spans": [
            [name, round(1000 * (start - first), 2), round(1000 * (end - first), 2)]
            for name, start, end in spans
            if start >= first - 1e-6
        ],
    }

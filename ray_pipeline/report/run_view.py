"""A run as a dashboard shows it, read from its folder again and again. Plain data in, text out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.records.event_log import EventFiles, event_text
from ray_pipeline.records.metrics_file import NewLines, read_samples

MOST_POINTS = 2000  # of a curve; of older ones every second is dropped
BARS = "▁▂▃▄▅▆▇█"
SHADES = " ░▒▓█"
# What is drawn of a stage, as far as it is measured: title, logged names of which the first that there is counts.
CURVES = (
    ("loss", ("train/loss",)),
    ("held-out", ("val/preference_accuracy", "val/accuracy", "val/validation_loss")),
    ("reward", ("grpo/reward",)),
    ("entropy", ("grpo/entropy",)),
    ("gradient norm", ("train/grad_norm",)),
    ("tokens/s", ("perf/tokens_per_second",)),
)


class StageView:
    """What a stage's folder holds, kept up to date by `refresh`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.last: dict[str, Any] = {}
        self.events: deque[str] = deque(maxlen=500)
        self._lines, self._files = NewLines(folder), EventFiles(folder)

    def refresh(self) -> list[str]:
        """Read what came since; the new events as text."""
        for line in self._lines.read():
            self.last |= line
            for name, value in line.items():
                if isinstance(value, int | float) and "/" in name:
                    self._add(name, line["step"], float(value))
        fresh = [event_text(event) for event in self._files.read() if event["level"] != "debug"]
        self.events.extend(fresh)
        return fresh

    def _add(self, name: str, step: int, value: float) -> None:
        points = self.curves.setdefault(name, [])
        while points and points[-1][0] >= step:  # steps that are taken again
            points.pop()
        points.append((step, value))
        if len(points) > MOST_POINTS:
            del points[:-100:2]

    def drawn(self) -> list[tuple[str, list[float]]]:
        """Title and values of each of `CURVES` that there is."""
        out = []
        for title, names in CURVES:
            name = next((name for name in names if name in self.curves), None)
            if name is not None:
                out.append((title, [value for _, value in self.curves[name]]))
        return out

    def memory(self) -> list[tuple[int, float]]:
        """Rank and 10^9 bytes."""
        found = {n: v for n, v in self.last.items() if n.startswith("memory/rank_")}
        return sorted((int(name.removeprefix("memory/rank_").removesuffix("_gb")), v) for name, v in found.items())

    def loads(self) -> list[tuple[str, list[float]]]:
        """Layer and tokens of each of its experts in the last step."""
        return [(n[4:].removesuffix("/load"), v) for n, v in sorted(self.last.items()) if n.endswith("/load")]

    def samples(self, most: int = 3) -> list[dict[str, Any]]:
        """The last evaluation's first answers."""
        try:
            return read_samples(self.folder)[:most]
        except ValueError:
            return []


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """`▁▂▅█`: the values' means over `width` equal parts; a space where none is a number."""
    if not values:
        return ""
    width = min(width, len(values))
    parts = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [_mean(part) for part in parts]
    known = [value for value in means if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else BARS[round((value - low) * scale)] for value in means)


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None


def heat(loads: Sequence[float], width: int = 64) -> str:
    """One character an expert: blank without a token, full at twice the mean. Of many, the means of neighbours."""
    count = min(width, len(loads))
    parts = [loads[len(loads) * i // count : len(loads) * (i + 1) // count] for i in range(count)]
    mean = sum(loads) / max(len(loads), 1)
    shares = [sum(part) / len(part) / mean / 2 if mean else 0.0 for part in parts]
    return "".join(SHADES[min(len(SHADES) - 1, math.ceil(share * (len(SHADES) - 1)))] for share in shares)

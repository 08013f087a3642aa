"""What was measured, as data: medians and spread of every row, its ratio to its peer, and where it was measured."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.parallel_bench.task import Row, Task

Rounds = list[list[tuple[float, float]]]
"""Seconds, and seconds of CPU time over all ranks, of each step, round by round."""

LOSS_TOLERANCE = 5e-6  # relative; fp32 sums in another order
NORM_TOLERANCE = 1e-4


def differences(reference: Sequence[tuple[float, float]], found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the gradient norms."""
    assert len(reference) == len(found)
    pairs = list(zip(reference, found, strict=True))
    return (
        max(abs(b[0] - a[0]) / abs(a[0]) for a, b in pairs),
        max(abs(b[1] - a[1]) / abs(a[1]) for a, b in pairs),
    )


def equal_enough(difference: tuple[float, float]) -> bool:
    """Whether two competitors compute the same thing, up to the order of fp32 sums. False for NaN."""
    return difference[0] <= LOSS_TOLERANCE and difference[1] <= NORM_TOLERANCE


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks; `share` in [0, 1]."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "p10": percentile(values, 0.1),
        "p90": percentile(values, 0.9),
    }


def _median(steps: Sequence[tuple[float, float]], which: int) -> float:
    return statistics.median(step[which] for step in steps)


def summarise(
    task: Task,
    rows: Sequence[Row],
    rounds: dict[str, Rounds],
    memory: dict[str, list[dict[str, int]]],
    difference: dict[str, tuple[float, float]],
) -> list[dict[str, Any]]:
    """One entry per row.

    `speed_vs_peer` is the peer's median step time over ours: above 1 ours is faster. `speed_vs_peer_per_round` is the
    same within each round, where both were timed next to each other: noise of the machine cancels in it.
    `cpu_vs_peer` compares the work of all threads and ranks, which other programs on the machine disturb least.
    """
    out = []
    for row in rows:
        seconds, cpu = ([pair[which] for each in rounds[row.name] for pair in each] for which in (0, 1))
        entry: dict[str, Any] = {
            "name": row.name,
            "kind": row.kind,
            "ranks": row.ranks,
            "micro_batch": row.micro_batch,
            "settings": row.settings,
            "tokens_per_second": task.tokens / statistics.median(seconds),
            "step_ms": spread([1e3 * value for value in seconds]),
            "cpu_ms_all_ranks": spread([1e3 * value for value in cpu]),
            "steps": len(seconds),
            "memory_per_rank": memory[row.name],
            "loss_difference": difference[row.name][0],
            "grad_norm_difference": difference[row.name][1],
        }
        if row.peer is not None:
            theirs = rounds[row.peer]
            pairs = zip(rounds[row.name], theirs, strict=True)
            entry["peer"] = row.peer
            entry["speed_vs_peer"] = _median([step for each in theirs for step in each], 0) / statistics.median(seconds)
            entry["cpu_vs_peer"] = _median([step for each in theirs for step in each], 1) / statistics.median(cpu)
            entry["speed_vs_peer_per_round"] = spread([_median(b, 0) / _median(a, 0) for a, b in pairs])
        out.append(entry)
    return out


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware_name(device_type: str) -> str:
    """Folder of the results: "cpu-2core", or "nvidia-h200-4gpu"."""
    if device_type == "cpu":
        return f"cpu-{os.cpu_count()}core"
    import torch

    name = torch.cuda.get_device_name(0).lower().replace(" ", "-")
    return f"{name}-{torch.cuda.device_count()}gpu"


def provenance(root: Path, device_type: str) -> dict[str, Any]:
    """Commit, versions and machine."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    versions = {}
    for package in ("torch", "deepspeed"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "model", "ray_pipeline", "scripts")),
        "versions": versions | {"python": platform.python_version()},
        "device": device_type,
        "hardware": hardware_name(device_type),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads_per_rank": 1,
        "load_average_at_start": os.getloadavg()[0],
    }


def lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A table to print."""
    columns = f"{'tokens/s':>9} {'step ms':>8} {'p10':>7} {'p90':>7} {'CPU ms':>8} {'MB/rank':>8}"
    out = [f"{'row':32} {columns}  speed / peer"]
    for entry in entries:
        step = entry["step_ms"]
        memory = max(each["peak_rss_bytes"] for each in entry["memory_per_rank"]) / 1e6
        text = f"{entry['name']:32} {entry['tokens_per_second']:9.0f} {step['median']:8.1f} {step['p10']:7.1f}"
        text += f" {step['p90']:7.1f} {entry['cpu_ms_all_ranks']['median']:8.1f} {memory:8.0f}"
        if "peer" in entry:
            paired = entry["speed_vs_peer_per_round"]
            text += f"  {entry['speed_vs_peer']:.3f} (by round {paired['median']:.3f}, {paired['p10']:.3f}"
            text += f"-{paired['p90']:.3f}; CPU {entry['cpu_vs_peer']:.3f}) {entry['peer']}"
        out.append(text)
    return out

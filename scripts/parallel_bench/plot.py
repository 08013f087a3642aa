"""The results as bars in an SVG, each of ours beside its peer. Knows the entries of the JSON and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, LEFT, RIGHT = 760, 230, 110  # pixels
BAR, GAP, HEAD = 14, 14, 46
OURS, PEER = "#2b6cb0", "#a0aec0"


def _groups(entries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each of ours with its peer below it."""
    by_name = {entry["name"]: entry for entry in entries}
    ours = [entry for entry in entries if entry["kind"] == "ours"]
    return [[entry] + ([by_name[entry["peer"]]] if entry.get("peer") in by_name else []) for entry in ours]


def bars(entries: Sequence[dict[str, Any]], caption: str) -> str:
    """Tokens per second: bars at the median, whiskers from the 10th to the 90th percentile."""
    groups = _groups(entries)
    shown = [entry for group in groups for entry in group]
    fastest = max(entry["tokens_per_second"] * entry["step_ms"]["median"] / entry["step_ms"]["p10"] for entry in shown)
    height = HEAD + sum(len(group) * BAR + GAP for group in groups) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="18" font-size="13">Tokens per second, median and 10th to 90th percentile: '
        f'<tspan fill="{OURS}">ours</tspan>, <tspan fill="#718096">torch</tspan></text>',
        f'<text x="10" y="34" fill="#718096">{escape(caption)}</text>',
    ]
    y = HEAD
    for group in groups:
        for entry in group:
            parts += _bar(entry, y, (WIDTH - LEFT - RIGHT) / fastest)
            y += BAR
        y += GAP
    return "\n".join([*parts, "</svg>", ""])


def _bar(entry: dict[str, Any], y: int, scale: float) -> list[str]:
    rate, step = entry["tokens_per_second"], entry["step_ms"]
    low, high = (LEFT + rate * step["median"] / step[key] * scale for key in ("p90", "p10"))
    colour, middle = OURS if entry["kind"] == "ours" else PEER, y + BAR / 2 - 1
    label = f"{rate:,.0f}"
    if "speed_vs_peer" in entry:
        label += f"  ({entry['speed_vs_peer']:.2f}x)"
    return [
        f'<text x="{LEFT - 8}" y="{y + 10}" text-anchor="end">{escape(entry["name"])}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{rate * scale:.1f}" height="{BAR - 2}" fill="{colour}"/>',
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="#1a202c"/>',
        f'<text x="{high + 6:.1f}" y="{y + 10}">{label}</text>',
    ]

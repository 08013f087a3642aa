"""CPU time of each form of a component over ours, as bars in an SVG. Knows the entries of the JSON and nothing else."""

from __future__ import annotations

from html import escape
from typing import Any

WIDTH, LEFT, BAR, HEAD, GAP = 760, 250, 14, 52, 10  # pixels
COLOURS = {"ours": "#2b6cb0", "plain": "#a0aec0"}
LIBRARY = "#dd6b20"


def times(data: dict[str, Any]) -> str:
    """One group of bars per component, ours first; shorter is quicker, and the line is ours."""
    shown = [(entry, form) for entry in data["components"] for form in entry["cpu_milliseconds"]]
    longest = max(_over_ours(entry, form) for entry, form in shown)
    scale = (WIDTH - LEFT - 130) / longest
    height = HEAD + len(shown) * (BAR + 2) + len(data["components"]) * GAP + 10
    caption = (
        f"{data['hardware']}, {data['threads']} thr., torch {data['versions']['torch']}, commit {data['commit'][:7]}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="10" y="18" font-size="13">Forward and backward: CPU time over ours (shorter is quicker)</text>',
        f'<text x="10" y="36" fill="#718096">{escape(caption)}</text>',
    ]
    y = HEAD
    for entry in data["components"]:
        for form, milliseconds in entry["cpu_milliseconds"].items():
            width = _over_ours(entry, form) * scale
            label = f"{entry['name']}: ours" if form == "ours" else form
            parts += [
                f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(label)}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLOURS.get(form, LIBRARY)}"/>',
                f'<text x="{LEFT + width + 6:.1f}" y="{y + 11}">{milliseconds["median"]:.2f} ms</text>',
            ]
            y += BAR + 2
        y += GAP
    line = LEFT + scale
    parts.append(f'<line x1="{line:.1f}" x2="{line:.1f}" y1="{HEAD - 6}" y2="{height - 8}" stroke="#1a202c"/>')
    return "\n".join([*parts, "</svg>", ""])


def _over_ours(entry: dict[str, Any], form: str) -> float:
    """By round, in which both were timed next to each other."""
    return 1.0 if form == "ours" else float(entry["speed_by_round"][form]["median"])

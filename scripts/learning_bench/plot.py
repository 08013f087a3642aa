"""Training losses of a race as SVG, drawn by hand: a panel a text, a line a competitor, the mean over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, PANEL, LEFT, HEAD = 720, 220, 60, 56
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#718096", "#b83280")


def losses(data: dict[str, Any]) -> str:
    """The SVG's text, of the trainings on equal tokens."""
    trainings = [t for t in data["trainings"] if t["race"] == "tokens"]
    texts = list(dict.fromkeys(t["text"] for t in trainings))
    names = list(dict.fromkeys(t["competitor"] for t in trainings))
    height = HEAD + PANEL * len(texts) + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="10" y="18" font-size="13">Training loss in nats per token, mean over seeds</text>',
        f'<text x="10" y="34" fill="#718096">{escape(data["hardware"])}, commit {data["commit"][:7]}</text>',
    ]
    for index, name in enumerate(names):
        x = LEFT + 130 * index
        out.append(f'<rect x="{x}" y="41" width="11" height="11" fill="{COLOURS[index % len(COLOURS)]}"/>')
        out.append(f'<text x="{x + 16}" y="51">{escape(name)}</text>')
    for row, text in enumerate(texts):
        of_text = [t for t in trainings if t["text"] == text]
        longest = max(t["steps"] for t in of_text)
        of_text = [t for t in of_text if t["steps"] == longest]
        curves = {name: mean([t["curve"] for t in of_text if t["competitor"] == name]) for name in names}
        out += panel(text, longest, {n: c for n, c in curves.items() if c}, names, HEAD + PANEL * row)
    return "\n".join([*out, "</svg>", ""])


def mean(curves: Sequence[Sequence[float]]) -> list[float]:
    """Point by point."""
    return [math.fsum(values) / len(values) for values in zip(*curves, strict=True)] if curves else []


def panel(text: str, steps: int, curves: dict[str, list[float]], names: Sequence[str], top: int) -> list[str]:
    """One text: a line for each competitor, and the losses at the borders."""
    low = min(min(curve) for curve in curves.values())
    high = max(curve[min(1, len(curve) - 1)] for curve in curves.values())
    span, bottom = max(high - low, 1e-9), top + PANEL - 24
    out = [f'<text x="{LEFT}" y="{top + 14}">{escape(text)}, {steps} steps</text>']
    for value in (low, high):
        y = bottom - (value - low) / span * (PANEL - 50)
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#e2e8f0"/>')
    for name, curve in curves.items():
        across = (WIDTH - 20 - LEFT) / max(1, len(curve) - 1)
        shown = [(LEFT + across * i, bottom - (min(v, high) - low) / span * (PANEL - 50)) for i, v in enumerate(curve)]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in shown)
        colour = COLOURS[names.index(name) % len(COLOURS)]
        out.append(f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return out

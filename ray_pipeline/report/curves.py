"""Curves as inline SVG, without scripts or outside resources. Knows points and labels, nothing of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 460, 220  # pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 30
LARGEST = 1e30  # a figure beyond this is a diverged one, and would flatten all others
COLOURS = ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)")
Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def chart(title: str, series: Mapping[str, Points], levels: Mapping[str, float] | None = None) -> str:
    """One chart: lines over steps, and dashed horizontal levels to be held against. Empty without a finite point."""
    lines = {name: _finite(points) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    kept = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + list(kept.values())
    scale = _Scale(min(xs), max(xs), min(ys), max(ys))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">', *_axes(scale)]
    for name, value in kept.items():
        y = scale.y(value)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="level" x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    for (_, points), colour in zip(lines.items(), _cycle(len(lines)), strict=True):
        if len(points) > 1:
            path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in _thinned(points))
            parts.append(f'<polyline points="{path}" style="stroke:{colour}"/>')
        else:
            x, y = points[0]
            parts.append(f'<circle cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3" style="fill:{colour}"/>')
    parts.append("</svg>")
    named = zip(lines, _cycle(len(lines)), strict=True)
    legend = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in named)
    return f"<figure><figcaption>{escape(title)}<small>{legend}</small></figcaption>{''.join(parts)}</figure>"


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if abs(x) < LARGEST and abs(y) < LARGEST]  # false for NaN, too


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _thinned(points: Sequence[tuple[float, float]], most: int = 400) -> Sequence[tuple[float, float]]:
    """At most about `most` points, the last one kept."""
    stride = max(1, len(points) // most)
    return points if stride == 1 else [*points[::stride], points[-1]]


class _Scale:
    """Data to pixels, with a margin above and below."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float):
        margin = (y_high - y_low) * 0.06 or max(abs(y_high) * 0.1, 1e-3)
        self.x_low, self.x_high = x_low, x_high if x_high > x_low else x_low + 1
        self.y_low, self.y_high = y_low - margin, y_high + margin

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _axes(scale: _Scale) -> list[str]:
    parts = []
    for value in ticks(scale.y_low, scale.y_high):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(scale.x_low, scale.x_high):
        parts.append(f'<text x="{scale.x(value):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{value:.6g}</text>')
    return parts

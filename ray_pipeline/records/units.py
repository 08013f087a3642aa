"""Numbers as people read them: counts, sizes, times and shares, each with its unit."""

from __future__ import annotations

import math

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def scaled(value: float, units: tuple[tuple[float, str], ...] = _UNITS) -> str:
    """`261 G`, ready for a unit's name behind it."""
    for size, letter in units:
        if value >= 0.9995 * size:  # what rounds to 1000 of the next smaller unit is 1 of this one
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def count_text(value: float) -> str:
    """`671B`, `36.6B`"""
    return scaled(value, _COUNTS).replace(" ", "")


def number_text(value: float) -> str:
    """`67,290`, `0.1235`."""
    whole = math.isfinite(value) and (value == round(value) or abs(value) >= 1e4)
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def percent(share: float) -> str:
    """`61.3%`"""
    return f"{100 * share:.1f}%"


def bytes_text(size: float) -> str:
    """`31.5 GB`"""
    return scaled(size, _UNITS[2:]) + "B"


def seconds_text(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def time_text(seconds: float) -> str:
    """Short times with three digits, long ones as a run's report writes them, very long ones in days."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.0f} days"
    if seconds >= 60:
        return seconds_text(seconds)
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"

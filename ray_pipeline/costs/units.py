"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

from ray_pipeline.records.progress import seconds_text

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def scaled(value: float, units: tuple[tuple[float, str], ...] = _UNITS) -> str:
    """`261 G`, ready for a unit's name behind it."""
    for size, letter in units:
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def count_text(value: float) -> str:
    """`671B`, `36.6B`"""
    return scaled(value, _COUNTS).replace(" ", "")


def bytes_text(size: float) -> str:
    """`31.5 GB`"""
    return scaled(size, _UNITS[2:]) + "B"


def time_text(seconds: float) -> str:
    """Short times with three digits, long ones as a run's report writes them, very long ones in days."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.0f} days"
    if seconds >= 60:
        return seconds_text(seconds)
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"

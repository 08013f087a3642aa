"""What a sweep tries: `--grid KEY=A,B` and `--grid KEY=LOW..HIGH` read, and their combinations. Starts nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ray_pipeline.errors import UserError
from ray_pipeline.settings.layers import short_text
from ray_pipeline.settings.messages import known_keys

MOST_SETTINGS = 1000  # of a grid
LOG_RATIO = 10.0  # of the ends of a range; from there on values are drawn evenly in their logarithm
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\.\.({_NUMBER})\s*")
_OWN = {  # keys that a sweep decides itself -> the way out
    "seed": "Use --seeds N, and --seed for the first of them",
    "run_name": "Every trial is a run with a name of its own; --name is the sweep's",
    "output_dir": "Trials lie in the sweep's folder; --output-dir says where that lies",
    "backend": "It changes no result; use --backend",
}
_FORM = "Write it as KEY=VALUE,VALUE, for example --grid pretrain.optimizer.name=adamw,muon"


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included. whole: integers alone. log: drawn evenly in their logarithm."""

    low: float
    high: float
    whole: bool
    log: bool

    @property
    def ends(self) -> tuple[str, str]:
        """Both as they are set."""
        return self.text(self.low), self.text(self.high)

    def text(self, value: float) -> str:
        """A value as it is set."""
        return str(round(value)) if self.whole else f"{value:.4g}"


@dataclass(frozen=True)
class Axis:
    """One `--grid`. name: as typed. keys: the settings that it sets. values: as text; empty where there is a range."""

    name: str
    keys: tuple[str, ...]
    values: tuple[str, ...] = ()
    range: Range | None = None


def parse_grid(given: Sequence[str], stages: Sequence[str]) -> tuple[Axis, ...]:
    """The axes.

    Args:
        given: each `KEY=VALUE,VALUE` or `KEY=LOW..HIGH`. stages: those that train in this sweep; a key without its
            stage, such as `optimizer.name`, is that of all of them.
    Raises:
        UserError: no such form, a key or value given twice, or a key that sweeps decide themselves.
    """
    axes: dict[str, Axis] = {}
    seen: dict[str, str] = {}
    for text in given:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not name or not values:
            raise UserError(f"--grid {short_text(text)}: no values of a key. {_FORM}.")
        if name in _OWN or name.startswith(("layout.", "tracking.", "modal.", "cost.")):
            way_out = _OWN.get(name, "It changes no result; use --set")
            raise UserError(f"--grid {name}: this is not for a grid. {way_out}.")
        axis = Axis(name, _keys(name, stages), *_values(name, values))
        for key in axis.keys:
            if key in seen:
                raise UserError(f"--grid {name}: {key} is given by --grid {seen[key]} already. Give it once.")
            seen[key] = name
        axes[name] = axis
    return tuple(axes.values())


def _keys(name: str, stages: Sequence[str]) -> tuple[str, ...]:
    every = tuple(f"{stage}.{name}" for stage in stages)
    return every if name not in known_keys() and every and all(key in known_keys() for key in every) else (name,)


def _values(name: str, text: str) -> tuple[tuple[str, ...], Range | None]:
    if (found := _RANGE.fullmatch(text)) is not None:
        low, high = (float(part) for part in found.groups())
        if not low < high or not math.isfinite(high):
            raise UserError(f"--grid {name}={text}: a range goes from a smaller number to a larger one.")
        whole = all(re.fullmatch(r"[+-]?\d+", part) for part in found.groups())
        return (), Range(low, high, whole, low > 0 and high >= LOG_RATIO * low)
    values = tuple(_split(text))
    for value in values:
        if not value:
            raise UserError(f"--grid {name}={short_text(text)}: an empty value. {_FORM}.")
        if values.count(value) > 1:
            raise UserError(f"--grid {name}={short_text(text)}: {value} is given twice. Give each value once.")
        if _RANGE.fullmatch(value):
            raise UserError(f"--grid {name}={short_text(text)}: a range stands alone. Give it, or values.")
    return values, None


def _split(text: str) -> list[str]:
    """At the commas that lie in no brackets: `[1, 2],[3]` are two values."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def combinations(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Every combination of values, by the axes' names; the last axis changes fastest.

    Raises:
        UserError: an axis is a range, or there are too many.
    """
    for axis in axes:
        if axis.range is not None:
            raise UserError(f"--grid {axis.name}: a range has no end of values. Add --search optuna, or list values.")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_SETTINGS:
        raise UserError(
            f"--grid: {count} combinations, more than {MOST_SETTINGS}. Give fewer, or --search optuna --trials N."
        )
    return [
        dict(zip((axis.name for axis in axes), values, strict=True)) for values in product(*(a.values for a in axes))
    ]


def corners(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Settings that hold every listed value and both ends of every range once at least, to be looked at beforehand."""
    ends = [axis.values if axis.range is None else axis.range.ends for axis in axes]
    longest = max(map(len, ends), default=1)
    return [
        {axis.name: values[index % len(values)] for axis, values in zip(axes, ends, strict=True)}
        for index in range(longest)
    ]


def overrides(axes: Sequence[Axis], values: Mapping[str, str]) -> dict[str, str]:
    """Dotted keys of the settings, as `--set` gives them."""
    return {key: values[axis.name] for axis in axes for key in axis.keys}


def setting_text(values: Mapping[str, str]) -> str:
    """`pretrain.optimizer.name=muon, model.attention=mla`; a sweep without axes has a single setting."""
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "as the recipe"

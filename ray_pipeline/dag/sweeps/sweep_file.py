"""What a sweep is, and its folder. No Ray.

SWEEP/
  sweep.json     what was asked for, and the settings that are tried
  recipe.yaml    the settings that all trials share
  .lock          held by the one process that works on the sweep
  01-adamw-seed0/    a trial: a run as `run` makes it, for `status`, `compare`, `chat` ... --output-dir SWEEP
  results.json, sweep.html   the table and the plot, written after every trial
  best.yaml      the best recipe, once every setting has ended
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ray_pipeline.dag.identity import identities
from ray_pipeline.dag.request import StageSelection
from ray_pipeline.dag.sweeps.sweep_grid import Axis, overrides, parse_grid
from ray_pipeline.errors import UserError, first_line
from ray_pipeline.records.artifacts import write_sealed, write_text
from ray_pipeline.records.integrity import read_sealed
from ray_pipeline.settings.chain import trained
from ray_pipeline.settings.layers import is_as_written, with_checksum
from ray_pipeline.settings.loading import config_yaml, load_config
from ray_pipeline.settings.schema import PipelineFields

SWEEP_FILE, RECIPE_FILE, BEST_FILE = "sweep.json", "recipe.yaml", "best.yaml"
RESULTS_FILE, PAGE_FILE, TUNE_FOLDER = "results.json", "sweep.html", ".tune"
FORMAT = 1
_NAME_LETTERS = 40  # that a setting's values take of a run's name
_WAY_OUT = "Put back a copy of it, or start another sweep with --name."


class _Stored(BaseModel):
    """sweep.json."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    created: float
    decides: str
    grid: list[str]
    until: str
    seeds: int
    search: Literal["grid", "optuna"]
    trials: int | None
    metric: str | None
    settings: list[dict[str, str]]


@dataclass
class Sweep:
    """One sweep.

    Attributes:
        base: the settings that all trials share; its `seed` is the first of `seeds`.
        grid: as given to `--grid`. until: the last stage. trials: settings that a search tries; None for a grid.
        settings: values by axis, of every setting so far; a grid has all of them from the start.
    """

    folder: Path
    base: PipelineFields
    grid: tuple[str, ...]
    until: str
    seeds: int
    search: Literal["grid", "optuna"] = "grid"
    trials: int | None = None
    metric: str | None = None
    settings: list[dict[str, str]] = field(default_factory=list)
    created: float = field(default_factory=time.time)

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that train, up to `until`."""
        selection = StageSelection(until=self.until)
        return tuple(stage for stage in trained(self.base) if selection.selects(stage))

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What differs between settings."""
        return parse_grid(self.grid, self.stages)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Each setting is tried with all of them."""
        return tuple(range(self.base.seed, self.base.seed + self.seeds))

    @property
    def decides(self) -> str:
        """What decides a trial's result beside its place in the grid: another value makes another sweep."""
        return list(identities(self.base).values())[-1].key

    def config(self, values: Mapping[str, str], seed: int, name: str) -> PipelineFields:
        """The settings of a trial: the shared ones with a setting's values, as the run `name`.

        Raises:
            UserError: the schema refuses them.
        """
        given: dict[str, Any] = overrides(self.axes, values)
        given |= {"seed": seed, "run_name": name, "output_dir": str(self.folder)}
        return load_config(self.folder / RECIPE_FILE, given)

    def write_recipe(self) -> None:
        """The shared settings, where trials read them."""
        refuse_edited(self.folder / RECIPE_FILE)
        write_text(self.folder / RECIPE_FILE, with_checksum(config_yaml(self.base)))

    def save(self) -> None:
        """Atomically."""
        stored = _Stored(
            format=FORMAT, created=self.created, decides=self.decides, grid=list(self.grid), until=self.until,
            seeds=self.seeds, search=self.search, trials=self.trials, metric=self.metric, settings=self.settings,
        )  # fmt: skip
        write_sealed(self.folder / SWEEP_FILE, stored.model_dump())


def run_name(index: int, values: Mapping[str, str], seed: int) -> str:
    """`03-muon-mla-seed0`: a trial's run."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join(values.values()))
    return "-".join(part for part in (f"{index + 1:02d}", slug[:_NAME_LETTERS].strip("._-"), f"seed{seed}") if part)


def is_sweep(folder: Path) -> bool:
    """Whether a sweep was begun there."""
    return (folder / SWEEP_FILE).is_file()


def refuse_foreign_sweep(folder: Path) -> None:
    """Refuse a folder that has something in it and is no sweep.

    Raises:
        UserError: naming the folder.
    """
    if folder.exists() and not is_sweep(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: is there, but no {SWEEP_FILE} in it, so this is not a sweep's folder, and nothing in it is "
            "replaced. Give another --name or --output-dir."
        )


def refuse_edited(path: Path) -> None:
    """Refuse to replace settings that were changed by hand.

    Raises:
        UserError: naming the file.
    """
    if path.exists() and not is_as_written(path.read_text(encoding="utf-8")):
        raise UserError(f"{path}: was changed by hand, and is not replaced. Move it away, then run the same command.")


def read_sweep(folder: Path) -> Sweep:
    """The sweep that was begun in the folder.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    values = read_sealed(folder / SWEEP_FILE, _WAY_OUT)
    try:
        stored = _Stored(**values)
    except ValidationError as error:
        raise UserError(f"{folder / SWEEP_FILE}: damaged ({first_line(error)}). {_WAY_OUT}") from None
    base = load_config(folder / RECIPE_FILE)
    return Sweep(
        folder, base, tuple(stored.grid), stored.until, stored.seeds, stored.search, stored.trials, stored.metric,
        stored.settings, stored.created,
    )  # fmt: skip


def refuse_other_sweep(now: Sweep, before: Sweep) -> None:
    """More seeds, more trials of a search, other stages and another metric go on with a sweep; the rest is another one.

    Raises:
        UserError: naming what differs.
    """
    other = [name for name in ("grid", "search") if getattr(now, name) != getattr(before, name)]
    if now.decides != before.decides:
        other.append("the recipe, its seed or its data")
    if other:
        raise UserError(
            f"sweep {now.folder.name} was begun with another {' and '.join(other)}. Give another --name, or go on "
            f"with it as it is: --resume {now.folder}."
        )

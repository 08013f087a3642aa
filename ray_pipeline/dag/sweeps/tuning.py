"""Trials on Ray Tune: which next, how many at once, and a search's suggestions by Optuna.

Tune keeps nothing that is needed later: what is done is read from the runs' ledgers, so a sweep that was killed goes on
by asking for the trials that are not.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from ray_pipeline.dag.sweeps.measure import Measure
from ray_pipeline.dag.sweeps.suggestions import Suggestions
from ray_pipeline.dag.sweeps.sweep_file import TUNE_FOLDER, Sweep
from ray_pipeline.dag.sweeps.trial import Place, run_trial
from ray_pipeline.report.sweep_result import TrialOutcome

FIGURE = "figure"  # the mean over a setting's seeds, by which a search goes
# Of every trial Tune wants something: a byte of memory, so that it holds no CPU that its workers need.
RESOURCES: list[dict[str, int | float]] = [{"memory": 1}]


@dataclass(frozen=True)
class Batch:
    """What Tune takes as one trial: a setting with one seed of a grid, or with all seeds of a search."""

    index: int
    values: Mapping[str, str]
    seeds: tuple[int, ...]

    def plain(self) -> dict[str, Any]:
        """Plain values, as Tune keeps them."""
        return {"index": self.index, "values": list(self.values.items()), "seeds": list(self.seeds)}


@dataclass(frozen=True)
class Told:
    """What is called while trials run: with the batch that begins, and with each outcome."""

    begun: Callable[[Batch], None]
    ended: Callable[[int, TrialOutcome], None]


def run_batch(config: dict[str, Any], sweep: Sweep, place: Place, measured: Measure, invocation: str) -> dict[str, Any]:
    """The function that Tune runs, in a process of its own."""
    batch = _batch(config)
    outcomes = [run_trial(sweep, batch.index, batch.values, seed, place, measured, invocation) for seed in batch.seeds]
    figures = [outcome.figure for outcome in outcomes if outcome.figure is not None]
    return {"outcomes": [asdict(outcome) for outcome in outcomes]} | ({FIGURE: fmean(figures)} if figures else {})


class _Listener(tune.Callback):
    """Passes on what Tune tells."""

    def __init__(self, told: Told):
        self.told = told

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps a copy of everything that it is given, and of a console there is none."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A batch begins."""
        self.told.begun(_batch(trial.config))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A batch has ended, however it ended."""
        for outcome in trial.last_result["outcomes"]:
            self.told.ended(_batch(trial.config).index, TrialOutcome(**outcome))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The batch's process is gone: killed, or out of memory."""
        text = Path(trial.error_file).read_text(encoding="utf-8").strip() if trial.error_file else ""
        reason = "its process ended" + (f": {text.splitlines()[-1]}" if text else "")
        batch = _batch(trial.config)
        for seed in batch.seeds:
            self.told.ended(batch.index, TrialOutcome("", seed, "failed", reason=reason))


def _batch(config: Mapping[str, Any]) -> Batch:
    plain = config["batch"]
    return Batch(plain["index"], dict(plain["values"]), tuple(plain["seeds"]))


class _Searched(Searcher):
    """A search as Tune asks it."""

    def __init__(self, suggestions: Suggestions, seeds: tuple[int, ...]):
        super().__init__()
        self.suggestions, self.seeds = suggestions, seeds

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """The search has its own."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as of `_Listener`: what was suggested is in the sweep's file."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next setting."""
        index, values = self.suggestions.ask(trial_id)
        return {"batch": Batch(index, values, self.seeds).plain()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the search what came of it; a setting of which every seed failed has no figure."""
        self.suggestions.tell(trial_id, (result or {}).get(FIGURE))


def run_batches(
    sweep: Sweep, work: Sequence[Batch] | Suggestions, place: Place, measured: Measure, jobs: int, told: Told
) -> None:
    """Run trials until none is left, on the Ray that this process is connected to.

    Args:
        work: the batches of a grid, or what suggests those of a search. jobs: trials at once.
    """
    folder = sweep.folder / TUNE_FOLDER
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is this program's own
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_MAX_PENDING_TRIALS_PG": str(jobs),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # names of files mean what they mean here
    }
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    space: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if isinstance(work, Suggestions):
        options = {"search_alg": _Searched(work, sweep.all_seeds), "num_samples": work.left}
    else:
        space = {"batch": tune.grid_search([batch.plain() for batch in work])}
    function: Any = tune.with_parameters(
        run_batch, sweep=sweep, place=place, measured=measured, invocation=uuid.uuid4().hex
    )
    tuner = tune.Tuner(
        tune.with_resources(function, tune.PlacementGroupFactory(RESOURCES)),
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=jobs, reuse_actors=True, **options),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:8], storage_path=str(folder), verbose=0, callbacks=[_Listener(told)]
        ),
    )
    try:
        with redirect_stdout(io.StringIO()):  # Tune draws a frame around its name even where it is told to be quiet
            tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)

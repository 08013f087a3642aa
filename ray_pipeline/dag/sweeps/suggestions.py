"""A search's next settings, by Optuna's tree of Parzen estimators (arXiv:1907.10902), through Ray Tune's adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from ray_pipeline.dag.sweeps.measure import Measure
from ray_pipeline.dag.sweeps.sweep_file import Sweep
from ray_pipeline.dag.sweeps.sweep_grid import Axis
from ray_pipeline.errors import UserError


def need_optuna() -> None:
    """Refuse a search where Optuna is not installed.

    Raises:
        UserError: saying how to install it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError('--search optuna: Optuna is not installed. Use `pip install "ray-pipeline[optuna]"`.')


class Suggestions:
    """Settings one by one, each entered in the sweep's file before it is tried.

    Args:
        figures: mean of every setting that is done, by its index. Settings without one, which a killed sweep left, are
            suggested first, and those with one are what the search has learned so far.
    """

    def __init__(self, sweep: Sweep, measured: Measure, figures: Mapping[int, float]):
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        assert sweep.trials is not None
        self.sweep, self.axes = sweep, sweep.axes
        self.left = max(0, sweep.trials - len(figures))
        self.waiting = [index for index in range(len(sweep.settings)) if index not in figures]
        self.search = OptunaSearch(
            {axis.name: _distribution(axis) for axis in self.axes},
            metric="figure",
            mode=measured.mode,
            points_to_evaluate=[self._point(sweep.settings[index]) for index in self.waiting] or None,
            seed=sweep.base.seed + len(sweep.settings),  # another one when it goes on, or it would begin alike
        )
        for index, figure in figures.items():
            self.search.add_evaluated_point(self._point(sweep.settings[index]), figure)

    def ask(self, trial_id: str) -> tuple[int, dict[str, str]]:
        """Index and values of the next setting."""
        point = self.search.suggest(trial_id)
        assert point is not None, "Optuna always has another one"
        if self.waiting:
            index = self.waiting.pop(0)
            return index, self.sweep.settings[index]
        values = {axis.name: _text(axis, point[axis.name]) for axis in self.axes}
        self.sweep.settings.append(values)
        self.sweep.save()
        return len(self.sweep.settings) - 1, values

    def tell(self, trial_id: str, figure: float | None) -> None:
        """What a setting reached; None where it failed."""
        result = None if figure is None else {"figure": figure}
        self.search.on_trial_complete(trial_id, result, error=figure is None)

    def _point(self, values: Mapping[str, str]) -> dict[str, Any]:
        return {axis.name: _value(axis, values[axis.name]) for axis in self.axes}


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    span = axis.range
    if span is None:
        return CategoricalDistribution(axis.values)
    if span.whole:
        return IntDistribution(int(span.low), int(span.high), log=span.log)
    return FloatDistribution(span.low, span.high, log=span.log)


def _text(axis: Axis, value: Any) -> str:
    return str(value) if axis.range is None else axis.range.text(value)


def _value(axis: Axis, text: str) -> Any:
    span = axis.range
    return text if span is None else int(text) if span.whole else min(max(float(text), span.low), span.high)

"""A sweep from its beginning, or from where it was, to its table: what is done already, what runs, what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console

from ray_pipeline.dag.plan import refuse_other_config
from ray_pipeline.dag.sweeps.measure import Measure, measure
from ray_pipeline.dag.sweeps.sweep_file import (
    BEST_FILE,
    PAGE_FILE,
    RESULTS_FILE,
    Sweep,
    refuse_edited,
    run_name,
)
from ray_pipeline.dag.sweeps.sweep_grid import corners, setting_text
from ray_pipeline.dag.sweeps.trial import Place, outcome_of
from ray_pipeline.dag.workflow import connected_ray
from ray_pipeline.errors import EXIT_FAILED, command
from ray_pipeline.records.artifacts import write_json, write_text
from ray_pipeline.records.units import seconds_text
from ray_pipeline.report.sweep_result import SettingRow, SweepResult, TrialOutcome, held_against_best, setting_row
from ray_pipeline.report.sweep_views import print_sweep, render_sweep
from ray_pipeline.settings.layers import with_checksum
from ray_pipeline.settings.loading import config_yaml
from ray_pipeline.settings.schema import PipelineFields

if TYPE_CHECKING:
    from ray_pipeline.dag.sweeps.tuning import Batch

Outcomes = dict[tuple[int, int], TrialOutcome]  # by a setting's index and the seed


@dataclass
class Conduct:
    """One call of `sweep`.

    Args:
        jobs: trials at once.
    """

    sweep: Sweep
    place: Place
    jobs: int
    console: Console
    outcomes: Outcomes = field(default_factory=dict)

    @property
    def measured(self) -> Measure:
        """By what settings are compared."""
        return measure(self.sweep.metric, self.sweep.stages)

    @property
    def _asked(self) -> int:
        """Trials of the whole sweep."""
        return (self.sweep.trials or len(self.sweep.settings)) * self.sweep.seeds

    def run(self) -> int:
        """Run what is not done yet and write the table after each trial.

        Returns:
            0, or 1 when a trial failed.
        """
        sweep = self.sweep
        self._look()
        asked, done = self._asked, len(self.outcomes)
        self._say(
            f"sweep {sweep.folder}: {asked} trials, {done} done, up to {sweep.until}; {self.jobs} at once. "
            f"Compared by {self.measured.title} ({self.measured.stage}.{self.measured.name}, "
            f"{'less' if self.measured.mode == 'min' else 'more'} is better)."
        )
        if done < asked:
            self._run_rest()
        result = self.result()
        self._write(result)
        print_sweep(self.console, result)
        self._write_best(result)
        self._say(f"Table, plot and runs are in {sweep.folder} ({PAGE_FILE}, {RESULTS_FILE})")
        return EXIT_FAILED if any(trial.status != "done" for trial in result.trials) else 0

    def _look(self) -> None:
        """Enter what the runs' ledgers say is done."""
        for index, values in enumerate(self.sweep.settings):
            for seed in self.sweep.all_seeds:
                name = run_name(index, values, seed)
                if not (self.sweep.folder / name).is_dir():
                    continue
                request = self.place.request(self.sweep.config(values, seed, name), self.sweep.until)
                refuse_other_config(request.config, request.run_dir)
                if (outcome := outcome_of(request, self.measured)) is not None and outcome.status == "done":
                    self.outcomes[index, seed] = outcome

    def _run_rest(self) -> None:
        from ray_pipeline.dag.sweeps.suggestions import Suggestions
        from ray_pipeline.dag.sweeps.tuning import Batch, Told, run_batches

        sweep = self.sweep
        # Seed by seed: a sweep that is stopped has tried every setting about as often.
        rest = [
            Batch(index, values, (seed,))
            for seed in sweep.all_seeds
            for index, values in enumerate(sweep.settings)
            if (index, seed) not in self.outcomes
        ]
        first = self.place.request(self._any_config(), sweep.until).layout
        with connected_ray(first, sweep.folder, sweep.base.layout.wait_for_nodes):
            work = Suggestions(sweep, self.measured, self._means()) if sweep.search == "optuna" else rest
            run_batches(sweep, work, self.place, self.measured, self.jobs, Told(self._begun, self._ended))

    def _any_config(self) -> PipelineFields:
        values = (self.sweep.settings or corners(self.sweep.axes))[0]
        return self.sweep.config(values, self.sweep.base.seed, run_name(0, values, self.sweep.base.seed))

    def _means(self) -> dict[int, float]:
        """Of the settings whose seeds are all done."""
        rows = {row.number - 1: row for row in self._rows() if row.whole}
        return {index: row.mean.value for index, row in rows.items() if row.mean is not None}

    def _begun(self, batch: Batch) -> None:
        for seed in batch.seeds:
            self._say(f"{run_name(batch.index, batch.values, seed)} begins: {setting_text(batch.values)}, seed {seed}")

    def _ended(self, index: int, outcome: TrialOutcome) -> None:
        name = run_name(index, self.sweep.settings[index], outcome.seed)
        self.outcomes[index, outcome.seed] = outcome
        count, result = f"{len(self.outcomes)} of {self._asked}", self.result()
        if outcome.figure is None:
            self._say(f"{name} FAILED ({count}): {outcome.reason.splitlines()[0]}")
        else:
            note = f"; {outcome.note}" if outcome.note else ""
            self._say(
                f"{name} done ({count}): {self.measured.title}: {result.value(outcome.figure)}, "
                f"{seconds_text(outcome.seconds)}{note}"
            )
        self._write(result)

    def _rows(self) -> list[SettingRow]:
        return [
            setting_row(
                index + 1,
                setting_text(values),
                values,
                [
                    self.outcomes.get((index, seed), TrialOutcome(run_name(index, values, seed), seed))
                    for seed in self.sweep.all_seeds
                ],
            )
            for index, values in enumerate(self.sweep.settings)
        ]

    def result(self) -> SweepResult:
        """The table as it is now."""
        sweep, measured = self.sweep, self.measured
        rows, best = held_against_best(self._rows(), less=measured.mode == "min")
        return SweepResult(
            sweep.folder,
            measured.stage,
            measured.name,
            measured.title,
            measured.mode == "min",
            sweep.all_seeds,
            rows,
            best,
        )

    def _write(self, result: SweepResult) -> None:
        write_json(self.sweep.folder / RESULTS_FILE, result.as_json())
        write_text(self.sweep.folder / PAGE_FILE, render_sweep(result))

    def _write_best(self, result: SweepResult) -> None:
        if result.best is None:
            self._say("No recipe is written: no setting is done with every seed.")
            return
        row, base = result.rows[result.best], self.sweep.base
        config = self.sweep.config(row.values, base.seed, run_name(result.best, row.values, base.seed))
        config = config.model_copy(update={"run_name": None, "output_dir": base.output_dir})
        path = self.sweep.folder / BEST_FILE
        refuse_edited(path)
        note = (
            f"# {row.text}: the best of {len(result.rows)} settings by {result.title}, sweep {self.sweep.folder.name}\n"
        )
        write_text(path, with_checksum(note + config_yaml(config)))
        self._say(f"The best recipe: {path}. Train it with: {command('run', '--config', path)}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

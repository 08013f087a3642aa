"""What came of a sweep: each setting's mean over its seeds, and whether it can be told from the best one.

Plain data in, plain data out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ray_pipeline.evaluation.seed_statistics import LEVEL, POWER, Mean, SeedTest, holm, mean_of, seed_test
from ray_pipeline.records.units import percent

KIND = "ray_pipeline.sweep"
KEYS = frozenset({"kind", "sweep", "metric", "settings", "seeds"})  # by which its file is known
Status = Literal["done", "failed", "not run"]


@dataclass(frozen=True)
class TrialOutcome:
    """One setting with one seed.

    Attributes:
        run: its name. figure: of a trial that is done. reason: why it failed.
        seconds: of all its stages, those that it shares with other trials too. note: what is odd though it is done.
    """

    run: str
    seed: int
    status: Status = "not run"
    figure: float | None = None
    reason: str = ""
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class SettingRow:
    """One setting.

    Attributes:
        number: from 1, as in its runs' names. trials: one a seed. mean: over those that are done; None without any.
        test: against the best setting; None for that one, and with fewer than two seeds in common.
        verdict: best, worse, not told apart; empty where there is no test. p-values are corrected for the number of
            tests (Holm).
    """

    number: int
    text: str
    values: Mapping[str, str]
    trials: Sequence[TrialOutcome]
    mean: Mean | None
    test: SeedTest | None = None
    p_value: float | None = None
    verdict: str = ""

    @property
    def failed(self) -> int:
        """Trials that failed."""
        return sum(trial.status == "failed" for trial in self.trials)

    @property
    def whole(self) -> bool:
        """Whether every seed is done."""
        return all(trial.status == "done" for trial in self.trials)


@dataclass(frozen=True)
class SweepResult:
    """A sweep's table. stage, figure, less: what is compared, and whether less of it is better. title: with its unit.

    best: index of the row with the best mean, of those whose seeds are all done; None where there is none.
    """

    folder: Path
    stage: str
    figure: str
    title: str
    less: bool
    seeds: Sequence[int]
    rows: Sequence[SettingRow]
    best: int | None

    @property
    def trials(self) -> list[TrialOutcome]:
        """Of all settings."""
        return [trial for row in self.rows for trial in row.trials]

    def value(self, number: float, *, difference: bool = False) -> str:
        """A figure as the table shows it: shares in percent, their differences in points."""
        if self.figure.endswith("accuracy"):
            return f"{100 * number:+.1f} points" if difference else percent(number)
        return f"{number:+.4f}" if difference else f"{number:.4f}"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": KIND,
            "schema": 1,
            "sweep": self.folder.name,
            "metric": {"stage": self.stage, "name": self.figure, "title": self.title, "less_is_better": self.less},
            "seeds": list(self.seeds),
            "level": LEVEL,
            "power": POWER,
            "best": None if self.best is None else self.rows[self.best].number,
            "settings": [
                {
                    "number": row.number,
                    "values": dict(row.values),
                    "trials": [asdict(trial) for trial in row.trials],
                    "mean": row.mean and asdict(row.mean),
                    "against_best": row.test and asdict(row.test) | {"holm_p_value": row.p_value},
                    "verdict": row.verdict,
                }
                for row in self.rows
            ],
        }


def setting_row(number: int, text: str, values: Mapping[str, str], trials: Sequence[TrialOutcome]) -> SettingRow:
    """A row of the table, as yet held against nothing."""
    figures = [trial.figure for trial in trials if trial.figure is not None]
    return SettingRow(number, text, values, trials, mean_of(figures) if figures else None)


def best_row(rows: Sequence[SettingRow], *, less: bool) -> int | None:
    """Index of the best mean among settings whose seeds are all done; of equal ones the first."""
    whole = [index for index, row in enumerate(rows) if row.whole and row.mean is not None]
    sign = 1 if less else -1
    return min(whole, key=lambda index: sign * _value(rows[index]), default=None)


def _value(row: SettingRow) -> float:
    assert row.mean is not None
    return row.mean.value


def held_against_best(rows: Sequence[SettingRow], *, less: bool) -> tuple[list[SettingRow], int | None]:
    """The rows with their tests and verdicts, and the index of the best one."""
    best = best_row(rows, less=less)
    if best is None:
        return list(rows), None
    tests = [None if row is rows[best] else _against(row, rows[best]) for row in rows]
    corrected = iter(holm([test.p_value for test in tests if test is not None]))
    out = []
    for row, test in zip(rows, tests, strict=True):
        p_value = None if test is None else next(corrected)
        verdict = "best" if row is rows[best] else ""
        if test is not None and p_value is not None:
            worse = p_value < LEVEL and (test.difference > 0) == less
            verdict = "worse" if worse else "not told apart"
        out.append(replace(row, test=test, p_value=p_value, verdict=verdict))
    return out, best


def _against(row: SettingRow, best: SettingRow) -> SeedTest | None:
    """On the seeds that both have."""
    own, other = ({t.seed: t.figure for t in each.trials if t.figure is not None} for each in (row, best))
    seeds = [seed for seed in own if seed in other]
    return seed_test([own[seed] for seed in seeds], [other[seed] for seed in seeds]) if len(seeds) > 1 else None

"""Sweeps of real runs on Ray: shared stages run once, the table has the runs' own figures, a killed sweep goes on."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.dag.identity import identities
from ray_pipeline.dag.ledger import read_record
from ray_pipeline.evaluation.seed_statistics import mean_of, seed_test
from ray_pipeline.settings.loading import load_config
from tests.pipeline.driving import TOY, finish, kill, stages, start, wait_until_stage_works

pytestmark = pytest.mark.slow
RUNS = ["01-adamw-seed0", "01-adamw-seed1", "02-muon-seed0", "02-muon-seed1"]
ASKED = ["sweep", "--config", str(TOY), "--until", "pretrain", "--name", "mine", "--seeds", "2"]
NAMES = [*ASKED, "--grid", "optimizer.name=adamw,muon"]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mine" / "results.json").read_text())


def figures(folder: Path) -> dict[str, float]:
    return {trial["run"]: trial["figure"] for each in results(folder)["settings"] for trial in each["trials"]}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    assert finish(start(*NAMES, "--json", str(folder / "out.json"), folder=folder), folder) == 0
    return folder


def test_a_stage_that_trials_share_runs_once(swept):
    records = [stages(swept / "mine", run) for run in RUNS]
    for seed in (0, 1):  # which decides the data, too
        first, other = (found["data_prep"] for found in records[seed::2])
        assert first["identity"] == other["identity"]
        assert (first["started"], first["attempt"]) == (other["started"], other["attempt"])
        pair = [Path(entry["folder"]) / "manifest.json" for entry in (first, other)]
        assert pair[0].stat().st_ino == pair[1].stat().st_ino
    assert len({found["pretrain"]["identity"] for found in records}) == 4
    assert len({found["pretrain"]["started"] for found in records}) == 4


def test_the_table_has_the_runs_own_figures(swept):
    own = {run: stages(swept / "mine", run)["pretrain"]["metrics"]["validation_loss"] for run in RUNS}
    assert figures(swept) == own
    adamw, muon = ([own[run] for run in RUNS if name in run] for name in ("adamw", "muon"))
    found = results(swept)
    assert [each["mean"]["value"] for each in found["settings"]] == [mean_of(adamw).value, mean_of(muon).value]
    best = found["best"]
    assert best == (1 if mean_of(adamw).value < mean_of(muon).value else 2)
    pair = (muon, adamw) if best == 1 else (adamw, muon)
    assert found["settings"][2 - best]["against_best"]["difference"] == seed_test(*pair).difference
    assert found == json.loads((swept / "out.json").read_text())
    assert (swept / "mine" / "sweep.html").read_text().startswith("<!doctype html>")


def test_the_best_recipe_is_the_best_trials(swept):
    best = load_config(swept / "mine" / "best.yaml")
    number = results(swept)["best"]
    run = next(run for run in RUNS if run.startswith(f"{number:02d}"))
    assert best.run_name is None and best.pretrain.optimizer.name == run.split("-")[1]
    assert identities(best)["pretrain"].key == stages(swept / "mine", run)["pretrain"]["identity"]


def test_more_seeds_are_added_to_those_that_are_done(swept, tmp_path):
    before = {run: stages(swept / "mine", run)["pretrain"]["finished"] for run in RUNS}
    known = figures(swept)
    resumed = start("sweep", "--resume", "mine", "--seeds", "3", folder=swept)
    assert finish(resumed, swept) == 0
    assert {run: stages(swept / "mine", run)["pretrain"]["finished"] for run in RUNS} == before
    found = figures(swept)
    assert found.items() >= known.items() and found.keys() - known.keys() == {"01-adamw-seed2", "02-muon-seed2"}


def test_a_sweep_that_was_stopped_and_killed_ends_as_one_that_was_not(swept, tmp_path):
    folder = tmp_path / "mine"
    first = start(*NAMES, folder=tmp_path)
    wait_until_stage_works(first, folder, RUNS[0], "pretrain", step=7)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=120) == 130
    assert f"sweep --resume {folder}" in (tmp_path / "output.log").read_text()
    second = start("sweep", "--resume", str(folder), folder=tmp_path)
    wait_until_stage_works(second, folder, RUNS[2], "pretrain", step=7)
    kill(second)
    done = record(folder, RUNS[0])
    assert done.is_finished and done.attempt == 2
    assert finish(start(*NAMES, folder=tmp_path), tmp_path) == 0
    assert record(folder, RUNS[0]).finished == done.finished, "a finished trial is not run again"
    assert record(folder, RUNS[2]).attempt == 2
    assert {run: figures(tmp_path)[run] for run in RUNS} == {run: figures(swept)[run] for run in RUNS}


def record(folder: Path, run: str):
    [found] = [read_record(path.parent) for path in (folder / run).glob("pretrain-*/record.json")]
    assert found is not None
    return found


def test_a_trial_that_fails_is_told_and_does_not_end_the_others(tmp_path):
    options = ["--grid", "pretrain.optimizer.lr=1000,1e-3", "--set", "pretrain.optimizer.warmup_steps=0"]
    assert finish(start(*ASKED, *options, folder=tmp_path), tmp_path) == 1
    bad, good = results(tmp_path)["settings"]
    assert [trial["status"] for trial in bad["trials"]] == ["failed", "failed"] and bad["mean"] is None
    assert all("pretrain" in trial["reason"] for trial in bad["trials"])
    assert [trial["status"] for trial in good["trials"]] == ["done", "done"] and results(tmp_path)["best"] == 2
    log = (tmp_path / "output.log").read_text()
    assert "01-1000-seed0 FAILED (1 of 4)" in log and "Traceback" not in log


def test_a_search_goes_on_with_what_it_has_learned(tmp_path):
    pytest.importorskip("optuna")
    asked = [*ASKED[:-2], "--seeds", "1", "--search", "optuna", "--grid", "pretrain.optimizer.lr=1e-4..1e-2"]
    began = time.time()
    assert finish(start(*asked, "--trials", "2", folder=tmp_path), tmp_path) == 0
    first = results(tmp_path)["settings"]
    assert finish(start(*asked, "--trials", "3", folder=tmp_path), tmp_path) == 0
    found = results(tmp_path)["settings"]
    assert found[:2] == first or [each["trials"] for each in found[:2]] == [each["trials"] for each in first]
    rates = [float(each["values"]["pretrain.optimizer.lr"]) for each in found]
    assert len(set(rates)) == 3 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    for number, rate in enumerate(rates, 1):
        [path] = (tmp_path / "mine").glob(f"{number:02d}-*")
        assert load_config(path / "config.yaml").pretrain.optimizer.lr == rate
        assert read_record(next(path.glob("pretrain-*"))).started > began

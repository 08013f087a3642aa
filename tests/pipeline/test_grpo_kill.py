"""GRPO over Ray, killed in rollouts, in scoring and in an update: it ends with the weights of an unbroken run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.launch.launchers import InlineLauncher, RayLauncher
from ray_pipeline.launch.local_ray import start_ray
from ray_pipeline.records.metrics_file import read_metrics
from tests.training.grpo_run import arguments, prepare, train

pytestmark = pytest.mark.slow
# The fourth iteration is killed; checkpoints are of the second and the fourth.
STEPS, KILLED = 5, 3
ENGINES: dict[str, dict[str, Any]] = {
    "ranks": {"rollout": {"workers": 0}},
    "actors": {"rollout": {"workers": 2}},
    "stale": {"rollout": {"workers": 2, "max_staleness": 1}},
}


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    import ray

    start_ray(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("grpo"))


def run(folder: Path, name: str, engine: str, fault: dict[str, Any] | None = None) -> dict[str, Any]:
    given = arguments(folder, name, steps=STEPS, **ENGINES[engine]) | {"fault": fault}
    return RayLauncher(1, "cpu", max_restarts=1).run("grpo", train, given)


@pytest.fixture(scope="module")
def unbroken(folder) -> dict[str, str]:
    return {engine: run(folder, f"{engine}-whole", engine)["digest"] for engine in ENGINES}


def test_actors_train_what_the_ranks_own_sampling_does_and_old_weights_do_not(unbroken):
    assert unbroken["actors"] == unbroken["ranks"] != unbroken["stale"]


def test_answers_of_older_weights_train_with_importance_weights_and_how_far_they_are_is_told(folder, unbroken):
    """The first answers are of the weights that they train; of later ones the sampler is a step behind."""
    fresh, stale = (
        [entry for entry in read_metrics(folder / f"{engine}-whole") if "grpo/effective_sample_size" in entry]
        for engine in ("actors", "stale")
    )
    assert len(fresh) == len(stale) == STEPS
    for entry in [*fresh, stale[0]]:
        assert entry["grpo/sampler_gap_max"] < 1e-5 and entry["grpo/effective_sample_size"] > 1 - 1e-6
    for entry in stale[1:]:
        assert entry["grpo/sampler_gap_max"] > 1e-3 and entry["grpo/effective_sample_size"] < 1 - 1e-6
        assert entry["grpo/correction_mean"] != pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("place", ["rollouts", "scoring", "update"])
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_there_it_resumes_to_the_same_weights(folder, unbroken, engine, place):
    name = f"{engine}-{place}"
    result = run(folder, name, engine, {"place": place, "iteration": KILLED})
    assert (folder / name / "struck").exists()
    assert result["started"] in (0, 2), "the checkpoint of step 2 may have been on its way"
    assert result["digest"] == unbroken[engine]


def test_two_ranks_with_actors_take_the_step_of_one(folder):
    one = InlineLauncher().run(
        "grpo", train, arguments(folder, "one", steps=1, updates_per_rollout=2) | {"fault": None}
    )
    given = arguments(folder, "two", steps=1, updates_per_rollout=2, layout={"dp_size": 2}, **ENGINES["actors"])
    two = RayLauncher(2, "cpu", max_restarts=0).run("grpo", train, given)
    assert abs(one["train_loss"] - two["train_loss"]) < 1e-6

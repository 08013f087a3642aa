"""The two phases of sparse attention in the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engine import engine
from ray_pipeline.launch.launchers import InlineLauncher
from ray_pipeline.settings.schema import TRAINING_STAGES
from tests.layouts import recipe
from tests.training.toy_run import arguments, train

SPARSE = {"attention": "dsa", "index_n_heads": 6, "index_head_dim": 8, "index_topk": 5}


def fit(folder: Path, **settings: Any) -> dict[str, Any]:
    given = arguments(folder, **settings)
    given["config"]["model"] |= SPARSE
    return InlineLauncher().run("pretrain", train, given)


@pytest.fixture
def phases(monkeypatch) -> list[bool]:
    """Whether each step was told to be dense."""
    told: list[bool] = []
    real = engine.set_warm_up
    monkeypatch.setattr(engine, "set_warm_up", lambda model, on: (told.append(on), real(model, on)))
    return told


def test_the_first_steps_are_dense_and_a_resumed_run_takes_up_its_phase(tmp_path, phases):
    unbroken = fit(tmp_path / "a", indexer_warmup_steps=3)
    assert phases == [True] * 3 + [False] * 5
    for step in (3, 6):
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path / f"b{step}", indexer_warmup_steps=3, fault={"kind": "bug", "rank": 0, "step": step})
        phases.clear()
        resumed = fit(tmp_path / f"b{step}", indexer_warmup_steps=3)
        assert phases == [done < 3 for done in range(resumed["started"], 8)]
        assert resumed | {"started": 0} == unbroken


def test_the_warm_up_changes_the_result(tmp_path):
    sparse, dense = (fit(tmp_path / str(steps), indexer_warmup_steps=steps) for steps in (0, 8))
    assert sparse["digest"] != dense["digest"]


def test_a_fifth_of_pretraining_is_dense_by_default_and_nothing_after_it():
    config = recipe(**{"pretrain.steps": 100})
    assert [config.dense_steps(stage) for stage in TRAINING_STAGES] == [20, 0, 0, 0, 0]
    given = {"pretrain.steps": 100, "pretrain.indexer_warmup_steps": 7}
    assert [recipe(**given).dense_steps(stage) for stage in TRAINING_STAGES] == [7, 0, 0, 0, 0]


def test_a_model_that_is_given_has_a_trained_indexer():
    assert recipe(**{"init_from.path": "folder"}).dense_steps("pretrain") == 0
    assert recipe(**{"init_from.path": "folder", "pretrain.indexer_warmup_steps": 7}).dense_steps("pretrain") == 7

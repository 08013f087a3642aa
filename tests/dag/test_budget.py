"""A budget is told at its marks and stops the run; training that is asked to stop saves and ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.dag import budget as module
from ray_pipeline.dag.budget import Budget, estimate_lines
from ray_pipeline.dag.plan import plan
from ray_pipeline.dag.request import StageSelection
from ray_pipeline.engine.checkpoints.checkpoint import list_checkpoints
from ray_pipeline.errors import UserError
from ray_pipeline.launch.launchers import InlineLauncher
from ray_pipeline.layout.layout import Layout
from ray_pipeline.records.progress import ask_to_stop, go_on, stop_reason
from ray_pipeline.settings.schema import CostConfig, PipelineFields
from tests.training.toy_run import arguments, train

OWN = PipelineFields(backend="cuda", cost=CostConfig(usd_per_gpu_hour=2.0, budget_usd=10.0))


def test_it_is_told_once_at_each_mark_and_stops_the_run_at_the_last(tmp_path, monkeypatch):
    said: list[str] = []
    watch = Budget(OWN, tmp_path, said.append)
    monkeypatch.setattr(module, "EVERY", 0.0)
    monkeypatch.setattr(module, "read_status", lambda run_dir: {"stages": []})
    for amount in (1.0, 5.0, 5.5, 7.6, 9.0, 9.5):
        monkeypatch.setattr(module, "spent", lambda config, stages, amount=amount: amount)
        watch.look()
    assert said == [f"Budget: ${a} of $10.00 are spent ({s}%)." for a, s in (("5.00", 50), ("7.60", 76), ("9.00", 90))]
    assert stop_reason(tmp_path) is None
    monkeypatch.setattr(module, "spent", lambda config, stages: 9.9)
    watch.look()
    assert stop_reason(tmp_path) == "$9.90 of cost.budget_usd=10 are spent"
    go_on(tmp_path)
    assert stop_reason(tmp_path) is None


def test_without_a_budget_nothing_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "read_status", lambda run_dir: pytest.fail("it looked"))
    Budget(PipelineFields(), tmp_path, print).look()


def test_the_estimate_names_stages_hours_and_money(tmp_path):
    config = PipelineFields(backend="modal", model_size="tiny")
    layout = Layout(gpus=1, device="cuda")
    lines = estimate_lines(config, layout, plan(config, layout, tmp_path, StageSelection()))
    assert (
        lines[0].startswith("Training will cost about $") and "1 GPUs at $3.95 an hour, modal.com/pricing" in lines[0]
    )
    assert [line.split()[0] for line in lines[1:]] == ["pretrain", "sft", "grpo", "distillation"]
    assert estimate_lines(PipelineFields(backend="cpu"), layout, []) == []


def test_training_that_is_asked_to_stop_saves_first_and_goes_on_from_there(tmp_path: Path):
    given = arguments(tmp_path, log_every=3, checkpoint_every=8)
    run_dir = tmp_path / "toy"
    ask_to_stop(run_dir, "$9.90 of cost.budget_usd=10 are spent")
    with pytest.raises(UserError, match=r"pretrain: saved at step 3 and stopped: \$9\.90 of cost\.budget_usd=10"):
        InlineLauncher().run("pretrain", train, given)
    assert [path.name for path in list_checkpoints(run_dir / "pretrain-0" / "checkpoints")] == ["step_00000003"]
    go_on(run_dir)
    found = InlineLauncher().run("pretrain", train, given)
    whole = InlineLauncher().run("pretrain", train, arguments(tmp_path / "whole", log_every=3, checkpoint_every=8))
    assert found["started"] == 3 and found["digest"] == whole["digest"]

"""What follows from a fault: a warning once, a step that is left out, a way back, an end; the same on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.errors import UserError
from ray_pipeline.launch.launchers import InlineLauncher, ProcessLauncher
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.records.guard_file import interventions_text, read_interventions
from ray_pipeline.records.metrics_file import read_metrics
from ray_pipeline.settings.checks import problems
from ray_pipeline.settings.guards_config import GuardsConfig
from ray_pipeline.settings.schema import LayoutConfig, OptimizerConfig, PipelineFields
from ray_pipeline.training.guards.detectors import BEFORE_THE_STEP
from ray_pipeline.training.guards.guards import Guards
from tests.engine.test_parity import CONFIG, make_batch
from tests.training.guards.test_detectors import FAULTS, WARM, sound
from tests.training.toy_run import arguments, train

STAGE = Path("toy", "pretrain-0")


def guards(folder: Path, **settings: Any) -> Guards:
    return Guards(GuardsConfig(**settings), Mesh(MeshSizes()), folder, "sft", "resume it")


def feed(watch: Guards, *losses: float) -> list[Any]:
    return [watch.look_before(step, {"loss": loss, "grad_norm": 1.0}) for step, loss in enumerate(losses, start=1)]


def test_a_warning_is_told_once_and_recorded(tmp_path, caplog):
    watch = guards(tmp_path)
    assert feed(watch, *[1.0] * 20, *[5.0] * 6) == [None] * 26
    (event,) = read_interventions(tmp_path)
    assert (event["guard"], event["policy"], event["step"], event["skipped"]) == ("loss spike", "warn", 21, [])
    assert caplog.text.count("sft: loss spike at step 21: the loss is 5, that of the last 8 steps 1") == 1


def test_more_than_a_warning_is_for_the_trainer_to_act_on(tmp_path):
    watch = guards(tmp_path, loss_spike="rewind")
    found = feed(watch, *[1.0] * 20, 5.0)[-1]
    assert (found.guard, found.policy, found.step, found.began) == ("loss_spike", "rewind", 21, 21)
    watch.rewound(found, 15)
    again = guards(tmp_path, loss_spike="rewind", max_rewinds=2)
    assert again.left_out == {21}, "a resumed run leaves out the same"
    again.rewound(found, 15)
    assert again.left_out == {20, 21}, "it did not help, so more is left out"
    with pytest.raises(UserError, match=r"sft: loss spike at step 21: .* went back 2 times before.*max_rewinds=2"):
        again.rewound(found, 15)
    assert interventions_text(read_interventions(tmp_path))[1].endswith("went back to step 15; skipped step 20, 21")


@pytest.mark.parametrize(
    ("name", "policy"),
    [(name, policy) for name in FAULTS for policy in get_args(get_type_hints(GuardsConfig)[name])],
)
def test_every_guard_has_every_policy_that_it_takes(tmp_path, name, policy):
    """Fed as the trainer feeds it: what it is to act on, or a warning kept with the stage."""
    others = {other: "stop" if other == "not_finite" else "off" for other in FAULTS if other != name}
    watch, figures = guards(tmp_path, **{**others, name: policy}), sound()
    early = any(make.__name__ == name for make in BEFORE_THE_STEP)
    look = watch.look_before if early else watch.look_after
    assert [look(step, next(figures)) for step in range(1, WARM + 1)] == [None] * WARM
    found = [look(WARM + step, next(figures) | FAULTS[name]) for step in range(1, 11)]
    acted = [finding for finding in found if finding is not None]
    told = read_interventions(tmp_path)
    if policy in ("off", "warn"):
        assert acted == []
        kept = [(event["guard"], event["policy"]) for event in told]
        assert kept == ([(name.replace("_", " "), "warn")] if policy == "warn" else [])
        return
    assert (acted[0].guard, acted[0].policy) == (name, policy)
    assert WARM < acted[0].began <= acted[0].step <= WARM + 10
    if policy == "skip":
        watch.skipped(acted[0])
        assert watch.left_out == {acted[0].step} == guards(tmp_path, **{name: policy}).left_out
    elif policy == "rewind":
        watch.rewound(acted[0], WARM)
        assert acted[0].step in guards(tmp_path, **{name: policy}).left_out
    else:
        assert f"sft: {acted[0].name} at step {acted[0].step}: " in str(watch.stop(acted[0]))
    (event,) = read_interventions(tmp_path)
    assert (event["guard"], event["policy"]) == (acted[0].name, policy)


def test_off_is_off(tmp_path):
    assert feed(guards(tmp_path, loss_spike="off"), *[1.0] * 20, 5.0)[-1] is None
    assert read_interventions(tmp_path) == []


def test_a_skip_where_weights_move_at_once_is_refused():
    config = PipelineFields(guards=GuardsConfig(loss_spike="skip"), layout=LayoutConfig(zero_stage=1))
    assert [text for text in problems(config) if text.startswith("guards.loss_spike=skip: with layout.zero_stage=1")]


def test_a_step_that_is_not_accepted_leaves_weights_moments_and_routers_as_they_were():
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OptimizerConfig(), micro_batch=8))
    engine.train_step(make_batch(0), CrossEntropy(), 1e-2)
    before = {name: tensor.clone() for name, tensor in engine.state().items()}
    asked: list[tuple[float, float]] = []
    stats = engine.train_step(make_batch(1), CrossEntropy(), 1e-2, lambda *figures: asked.append(figures))
    assert asked == [(pytest.approx(stats.loss), pytest.approx(stats.grad_norm))]
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state().items())
    engine.train_step(make_batch(1), CrossEntropy(), 1e-2, lambda loss, norm: True)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in engine.state().items())


def fit(folder: Path, *, ranks: int = 1, **settings: Any) -> dict[str, Any]:
    launcher = InlineLauncher() if ranks == 1 else ProcessLauncher(ranks)
    return launcher.run("pretrain", train, arguments(folder, **settings))


LONG = {"steps": 24, "checkpoint_every": 4, "eval_every": 24, "log_every": 2, "keep_checkpoints": 3}
SPIKE = {"kind": "spike", "rank": -1, "step": 17}
NAN = {"kind": "nan", "rank": -1, "step": 17}


@pytest.mark.slow
@pytest.mark.parametrize("fault, name", [(SPIKE, "loss spike"), (NAN, "not finite")])
@pytest.mark.parametrize("layout", [{}, {"pp_size": 2, "gpus": 2}, {"dp_size": 2, "gpus": 2, "zero_stage": 2}])
def test_training_goes_back_and_ends_near_the_undisturbed_loss(tmp_path, fault, name, layout):
    policy = {"loss_spike": "rewind", "not_finite": "rewind", "exploding_gradients": "off"}
    ranks = layout.get("gpus", 1)
    undisturbed = fit(tmp_path / "a", ranks=ranks, layout=layout, **LONG)
    found = fit(tmp_path / "b", ranks=ranks, layout=layout, fault=fault, guards=policy, **LONG)
    (event,) = read_interventions(tmp_path / "b" / STAGE)
    assert (event["guard"], event["step"], event["back_to"], event["skipped"]) == (name, 18, 16, [18])
    assert found["validation_loss"] == pytest.approx(undisturbed["validation_loss"], rel=0.05)
    lines = read_metrics(tmp_path / "b" / STAGE)
    assert [line["step"] for line in lines if "train/loss" in line] == [*range(2, 25, 2)]


@pytest.mark.slow
def test_a_skipped_step_is_not_taken_and_a_run_that_went_back_resumes_to_the_same_weights(tmp_path):
    skipped = fit(tmp_path / "a", fault=SPIKE, guards={"loss_spike": "skip", "exploding_gradients": "off"}, **LONG)
    (event,) = read_interventions(tmp_path / "a" / STAGE)
    assert (event["policy"], event["skipped"], event["back_to"]) == ("skip", [18], None)
    policy = {"loss_spike": "rewind", "exploding_gradients": "off"}
    whole = fit(tmp_path / "b", fault=SPIKE, guards=policy, **LONG)
    assert whole["digest"] == skipped["digest"], "both leave out one batch and no more"
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "c", fault=SPIKE | {"later": 21}, guards=policy, **LONG)
    resumed = fit(tmp_path / "c", fault=SPIKE, guards=policy, **LONG)
    assert resumed["digest"] == whole["digest"]
    assert json.loads((tmp_path / "c" / STAGE / "guards.json").read_text())["interventions"][0]["back_to"] == 16

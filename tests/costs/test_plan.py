"""The plan as a whole: whether it fits, what would, and that JSON holds all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.cli.options import Request
from ray_pipeline.config import PipelineFields
from ray_pipeline.config_load import load_config
from ray_pipeline.costs.hardware_table import find_hardware
from ray_pipeline.costs.plan import Plan, make_plan
from ray_pipeline.costs.units import bytes_text, time_text
from ray_pipeline.layout import Layout
from ray_pipeline.layout_choice import resolve_layout
from ray_pipeline.workflow_plan import PROCESS, estimate_memory

KINDS = ("weights", "gradients", "optimizer", "activations", "buffers")
V3 = load_config(Path("configs/v3-671b.yaml"), {})
PUBLISHED = Layout(gpus=2048, pp=16, dp=128, ep=64, zero_stage=1, device="cuda")


@pytest.fixture(scope="module")
def published() -> Plan:
    return make_plan(V3, PUBLISHED, "pretrain", find_hardware("h800"))


def flags_of(advice: str) -> list[str]:
    return advice.split(" (")[0].split()


def parsed(config_file: Path, flags: list[str]) -> PipelineFields:
    """Settings as the command line makes them from a suggestion's flags."""
    from click.testing import CliRunner

    from ray_pipeline.cli import plan as verb

    seen: list[PipelineFields] = []
    original = Request.load

    def load(self: Request) -> PipelineFields:
        seen.append(original(self))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "load", load)
        CliRunner().invoke(verb.plan, ["--config", str(config_file), *flags])
    return seen[0]


def test_v3_as_published_does_not_fit_without_checkpointing_and_what_is_advised_does(published: Plan) -> None:
    assert not published.fits
    assert published.advice
    for line in published.advice:
        dp = ["--gpus", "2048", "--dp-size", "128"] if "-size" not in line else ["--gpus", "2048"]
        config = parsed(Path("configs/v3-671b.yaml"), [*dp, *flags_of(line)])
        layout = resolve_layout(config.model_copy(update={"backend": "modal"}), 0)
        again = make_plan(config, layout, "pretrain", find_hardware("h800"))
        assert again.fits
        memory = again.memory[again.fullest].total
        assert line.endswith(f"({bytes_text(memory)}, {time_text(again.timing.seconds)} a step)")


def test_v3s_step_takes_longer_than_published_but_not_by_an_order(published: Plan) -> None:
    """180K H800 hours per trillion tokens (arXiv:2412.19437, table 1), in fp8 and with communication hidden."""
    theirs = published.work.tokens_per_step / 1e12 * 180e3 * 3600 / 2048
    assert theirs < published.timing.seconds < 5 * theirs


def test_json_holds_the_whole_plan(published: Plan) -> None:
    found = json.loads(json.dumps(published.as_dict()))
    assert round(found["parameters"]["total_without_mtp"] / 1e9) == 671
    assert round(found["parameters"]["active_without_mtp"] / 1e9) == 37
    assert found["step"]["tokens"] == 15360 * 4096
    assert found["placement"][0] == "E+4" and "|".join(found["placement"]) == found["pp_layout"]
    assert len(found["memory"]) == 16
    for rank in found["memory"]:
        assert rank["total"] == sum(rank[kind] for kind in KINDS)
        assert rank["buffers"] == sum(rank["buffers_by_name"].values())
    assert {message["axis"] for message in found["communication"]} == {"ep", "pp", "dp", "dp, experts"}
    assert found["timing"]["stage_seconds"] == found["timing"]["seconds"] * 235000


@pytest.mark.parametrize("stage", ["pretrain", "sft", "grpo", "distillation"])
def test_every_training_stage_has_a_plan(stage: str) -> None:
    config = load_config(None, {})
    plan = make_plan(config, Layout(), stage, find_hardware("cpu"))
    assert plan.fits and plan.timing.seconds > 0


def test_a_runs_own_plan_shows_the_same_memory() -> None:
    config = load_config(None, {"backend": "cpu"})
    memory = make_plan(config, Layout(), "pretrain", find_hardware("cpu")).memory[0]
    assert estimate_memory(config, "pretrain") == PROCESS + memory.total
    assert estimate_memory(config, "sft") > estimate_memory(config, "pretrain")  # whole models to evaluate with


def test_a_reference_model_and_a_teacher_take_memory_too() -> None:
    config = load_config(None, {})
    without = config.model_copy(update={"grpo": config.grpo.model_copy(update={"beta": 0.0})})
    weights = [make_plan(c, Layout(), "grpo", find_hardware("h100")).memory[0].weights for c in (config, without)]
    assert weights[0] == 2 * weights[1]

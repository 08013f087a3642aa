"""The plan as a whole: whether it fits, what would, and that JSON holds all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ray_pipeline.cli.options import Request
from ray_pipeline.costs.estimate import Plan, make_plan
from ray_pipeline.costs.fit import rank_bytes, with_sampling
from ray_pipeline.costs.hardware_table import PROCESS, find_hardware
from ray_pipeline.costs.table import needs_text
from ray_pipeline.costs.workload import workload
from ray_pipeline.layout.choice import resolve_layout
from ray_pipeline.layout.layout import Layout, with_layout
from ray_pipeline.records.units import bytes_text, time_text
from ray_pipeline.settings.chain import trained
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import PipelineFields

KINDS = ("weights", "gradients", "optimizer", "activations", "buffers")
V3 = load_config(Path("configs/v3-671b.yaml"), {})
V3_16B = load_config(Path("configs/v3-16b-8xh100.yaml"), {})
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


def test_what_does_not_fit_without_checkpointing_does_as_it_is_advised() -> None:
    layout = Layout(gpus=8, pp=8, device="cuda")
    found = make_plan(V3_16B, layout, "pretrain", find_hardware("h100"))
    assert not found.fits and found.advice
    for line in found.advice:
        config = parsed(Path("configs/v3-16b-8xh100.yaml"), ["--gpus", "8", *flags_of(line)])
        layout = resolve_layout(config.model_copy(update={"backend": "modal"}), 0)
        again = make_plan(config, layout, "pretrain", find_hardware("h100"))
        assert again.fits
        needs = again.needs[again.fullest]
        assert line.endswith(f"({bytes_text(needs)}, {time_text(again.timing.seconds)} a step)")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "grpo", "distillation"])
def test_the_671b_model_fits_with_shards_and_with_whole_copies_nowhere(stage: str) -> None:
    """In every stage, with full checkpointing; `auto` finds it, and no flag would make whole copies fit."""
    layout = replace(PUBLISHED, activation_checkpointing="full")
    config, device = with_layout(V3.model_copy(update={"backend": "modal"}), layout), find_hardware("h800")
    found, whole = make_plan(config, layout, stage, device), 4 * V3.model.num_params()
    assert found.fits and not found.work.copies.device and found.host < whole
    if stage == "pretrain":
        return
    assert with_sampling(config, layout, stage, device).layout.sampling == "sharded"
    config = config.model_copy(update={"layout": config.layout.model_copy(update={"sampling": "whole"})})
    copied = make_plan(config, layout, stage, device)
    assert not copied.fits and not copied.advice and "whole model" in copied.work.copies.device
    assert rank_bytes(config, layout, stage) == PROCESS + copied.needs[copied.fullest] > whole
    if stage != "distillation":
        assert copied.host > 8 * whole > copied.host_usable


def test_auto_takes_whole_copies_where_they_fit_where_nothing_is_known_and_where_shards_cannot() -> None:
    tiny, layout = load_config(Path("configs/tiny.yaml"), {}), Layout(gpus=2, dp=2)
    for config, hardware, way in (
        (tiny, replace(find_hardware("cpu"), memory=8 << 30), "whole"),
        (tiny, None, "whole"),
        (tiny, replace(find_hardware("cpu"), memory=1 << 28), "sharded"),
        (load_config(Path("configs/tiny.yaml"), {"grpo.rollout.workers": 1}), None, "whole"),
    ):
        assert with_sampling(config, layout, "grpo", hardware).layout.sampling == way
    asked = load_config(Path("configs/tiny.yaml"), {"layout.sampling": "sharded"})
    assert with_sampling(asked, layout, "grpo", replace(find_hardware("cpu"), memory=8 << 30)) is asked


def test_samplers_a_reference_and_a_teacher_are_counted() -> None:
    config = load_config(None, {"grpo.rollout.workers": 2})
    size = 4 * config.model.num_params()
    beside = workload(config, Layout(), "grpo").copies
    assert beside.once["samplers"] > 2 * size and beside.once["weights on their way to samplers"] == size
    on_gpus = workload(config, Layout(device="cuda"), "grpo").copies
    assert "samplers" not in on_gpus.once, "they have GPUs of their own"
    distilled = workload(config, Layout(), "distillation").copies
    assert distilled.before["teacher"] == size and "teacher's weights" not in distilled.host, "read one by one"
    assert distilled.device["whole model"] < size, "the student's"


# What a recipe's name or first line promises.
SHIPPED = {
    "tiny": "cpu", "tiny-full": "cpu", "tiny-zero": "cpu", "tiny-gsm8k": "cpu", "tiny-preference": "cpu",
    "tiny-tools": "cpu", "smoke": "cpu",
    "mini-3gpu-pp3": "a100-40gb", "small": "h100", "medium": "h100", "large": "h200", "v3-16b-8xh100": "h100",
}  # fmt: skip


def test_every_shipped_recipe_but_the_671b_model_fits_its_hardware_in_every_stage() -> None:
    assert SHIPPED.keys() == {path.stem for path in Path("configs").glob("*.yaml")} - {"v3-671b"}
    for recipe, hardware in SHIPPED.items():
        config = load_config(Path(f"configs/{recipe}.yaml"), {})
        backend = "cpu" if hardware == "cpu" else "modal"
        layout = resolve_layout(config.model_copy(update={"backend": backend}), 0)
        device = replace(find_hardware(hardware), **({"memory": 8 << 30} if hardware == "cpu" else {}))
        for stage in trained(config):
            found = make_plan(config, layout, stage, device)
            assert found.fits, f"{recipe}, {stage}: {needs_text(found)}"


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
    assert {message["axis"] for message in found["communication"]} == {"ep", "ep, nodes", "pp", "dp", "dp, experts"}
    assert found["timing"]["stage_seconds"] == found["timing"]["seconds"] * 235000


@pytest.mark.parametrize("stage", ["pretrain", "sft", "grpo", "distillation"])
def test_every_training_stage_has_a_plan(stage: str) -> None:
    config = load_config(None, {})
    plan = make_plan(config, Layout(), stage, find_hardware("cpu"))
    assert plan.fits and plan.timing.seconds > 0


def test_a_runs_own_plan_shows_the_same_memory() -> None:
    config = load_config(None, {"backend": "cpu"})
    for stage in ("pretrain", "grpo"):
        found = make_plan(config, Layout(), stage, find_hardware("cpu"))
        assert rank_bytes(config, Layout(), stage) == PROCESS + found.needs[0]
    assert rank_bytes(config, Layout(), "sft") > rank_bytes(
        config, Layout(), "pretrain"
    )  # whole models to evaluate with


def test_a_reference_model_and_a_teacher_take_memory_too() -> None:
    config = load_config(None, {})
    without = config.model_copy(update={"grpo": config.grpo.model_copy(update={"beta": 0.0})})
    weights = [make_plan(c, Layout(), "grpo", find_hardware("h100")).memory[0].weights for c in (config, without)]
    assert weights[0] == 2 * weights[1]

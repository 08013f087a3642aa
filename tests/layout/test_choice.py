"""Which layout a run gets, and the nearest one to a layout that cannot run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.parallel.grid import MeshSizes
from ray_pipeline.cli.options import FLAG_KEYS
from ray_pipeline.dag.identity import identities
from ray_pipeline.errors import UserError
from ray_pipeline.layout.choice import device_notice, nearest_legal, resolve_layout
from ray_pipeline.layout.layout import Layout, with_layout
from ray_pipeline.layout.rules import broken_rule
from ray_pipeline.settings.layout_config import AxesConfig, LayoutConfig, LayoutOptions
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import PipelineFields
from tests.layouts import SIX_LAYERS, WANTED, asked_for, recipe

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def config(**layout: int | str) -> PipelineFields:
    backend = layout.pop("backend", "auto")
    given = {f"layout.{key}": value for key, value in layout.items()}
    return load_config(Path("tiny-full"), {"backend": backend, **given})


def told(gpus_available: int = 0, **layout: int | str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_layout(config(**layout), gpus_available)
    return str(caught.value)


def test_one_cpu_rank_without_any_flag() -> None:
    settings = config()
    layout = resolve_layout(settings, 0)
    assert layout == Layout(device="cpu")
    assert device_notice(settings, layout) is None


def test_three_cpu_ranks_and_a_notice_where_gpus_were_asked_for() -> None:
    settings = config(gpus=3, pp_size=3)
    layout = resolve_layout(settings, 0)
    assert layout == Layout(gpus=3, pp=3, device="cpu")
    assert device_notice(settings, layout) == "no GPU here: 3 CPU worker processes over gloo"
    assert device_notice(config(gpus=3, pp_size=3, backend="cpu"), layout) is None


def test_all_gpus_without_flags_and_dp_takes_what_is_left() -> None:
    assert resolve_layout(config(), 8) == Layout(gpus=8, dp=8, device="cuda")
    assert resolve_layout(config(gpus=4, pp_size=2), 8) == Layout(gpus=4, pp=2, dp=2, device="cuda")
    assert resolve_layout(config(pp_size=3), 0) == Layout(gpus=3, pp=3, device="cpu")
    assert resolve_layout(config(dp_size=2, zero_stage=1), 0) == Layout(gpus=2, dp=2, zero_stage=1, device="cpu")


def test_without_flags_a_gpu_that_does_not_divide_the_batch_stays_idle() -> None:
    layout = resolve_layout(config(), 7)
    assert (layout.gpus, layout.dp) == (4, 4)


def test_cpu_backend_ignores_gpus() -> None:
    assert resolve_layout(config(backend="cpu"), 8) == Layout(device="cpu")
    assert resolve_layout(config(), 8, cpu_only=True) == Layout(device="cpu")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_legal_layout(path: Path) -> None:
    settings = load_config(path, {})
    gpus = settings.layout.gpus or 1
    assert resolve_layout(settings, gpus).gpus == gpus


def test_none_given_as_a_flag_is_the_word_and_not_the_absence_of_one() -> None:
    assert config(activation_checkpointing="none").layout.activation_checkpointing == "none"
    assert config(pp_layout="none").layout.pp_layout is None


def test_the_layout_is_not_part_of_a_stages_identity() -> None:
    plain = identities(PipelineFields(), {})
    everything = {
        "gpus": 8, "pp_size": 2, "dp_size": 2, "tp_size": 2, "ep_size": 2, "zero_stage": 1, "schedule": "zbv",
        "pp_layout": "E+3|3+H", "activation_checkpointing": "full", "offload_optimizer": True, "min_gpus": 4,
    }  # fmt: skip
    assert identities(recipe(**everything), {}) == plain


def test_every_option_is_declared_once_and_has_a_flag() -> None:
    options = {option.name for option in fields(LayoutOptions)}
    assert options <= {field.name for field in fields(Layout)} and options <= LayoutConfig.model_fields.keys()
    assert not options & (LayoutConfig.__annotations__.keys() | Layout.__annotations__.keys())
    assert all(FLAG_KEYS[option] == (f"layout.{option}",) for option in options)
    sizes = {f"{axis.name}_size" for axis in fields(MeshSizes)}
    assert sizes == AxesConfig.__annotations__.keys() and sizes <= FLAG_KEYS.keys()


def test_flags_ask_for_the_layout_they_come_from() -> None:
    layout = Layout(
        gpus=8, pp=2, dp=2, tp=1, ep=2, sp=2, zero_stage=2, device="cpu", schedule="interleaved_1f1b",
        pp_layout="E+1|1|1|3", activation_checkpointing="selective", offload_optimizer=True, min_gpus=4,
    )  # fmt: skip
    assert layout.flags() == (
        "--gpus 8 --pp-size 2 --dp-size 2 --sp-size 2 --ep-size 2 --zero-stage 2 --schedule interleaved_1f1b "
        '--pp-layout "E+1|1|1|3" --activation-checkpointing selective --offload-optimizer --min-gpus 4'
    )
    assert layout.describe() == (
        "8 CPU ranks: pp=2 dp=2 sp=2 ep=2 ZeRO=2 interleaved_1f1b E+1|1|1|3 checkpointing=selective offload min_gpus=4"
    )
    filled = with_layout(PipelineFields(), layout)
    assert asked_for(filled) == layout


def test_gpus_that_are_not_there() -> None:
    assert "no GPU that PyTorch can use" in told(0, gpus=1, backend="cuda")
    text = told(1, gpus=3, pp_size=3)
    assert "gpus=3: this machine has 1 GPU. Use --gpus 1, or --backend cpu" in text
    assert "has 2 GPUs" in told(2, gpus=3, backend="cuda")


def test_modal_needs_no_gpu_here() -> None:
    assert resolve_layout(config(gpus=3, pp_size=3, backend="modal"), 0) == Layout(gpus=3, pp=3, device="cuda")


def test_with_layout_fills_in_every_size() -> None:
    settings = config(gpus=4, pp_size=2)
    filled = with_layout(settings, resolve_layout(settings, 0)).layout
    assert (filled.gpus, filled.pp_size, filled.dp_size) == (4, 2, 2)
    assert filled.micro_batch == settings.layout.micro_batch


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"gpus": 4, "pp_size": 3}, "--gpus 3 --pp-size 3"),
        ({"gpus": 3}, "--gpus 3 --pp-size 3"),
        ({"gpus": 8, "sp_size": 8}, "--gpus 8 --dp-size 2 --sp-size 4"),
        ({"gpus": 8, "ep_size": 3}, "--gpus 8 --dp-size 8 --ep-size 4"),
        ({"pp_size": 2, "schedule": "zbv", "zero_stage": 3, **SIX_LAYERS}, "--gpus 2 --pp-size 2 --zero-stage 3"),
        (
            {"pp_size": 2, "schedule": "dualpipev", "micro_batch": 16, **SIX_LAYERS},
            "--gpus 2 --pp-size 2 --schedule zbv",
        ),
        ({"gpus": 2, "offload_optimizer": True}, "--gpus 2 --dp-size 2"),
        ({"gpus": 4, "pp_size": 2, "pp_layout": "1|2"}, "--gpus 4 --pp-size 2 --dp-size 2"),
        ({"gpus": 4, "min_gpus": 3}, "--gpus 4 --dp-size 4"),
    ],
)
def test_the_nearest_layout_changes_as_little_as_it_can(settings: dict, flags: str) -> None:
    asked = recipe(**settings)
    wanted = asked_for(asked)
    assert nearest_legal(asked, wanted, max(wanted.gpus, wanted.pp)).flags() == flags


@given(wanted=WANTED, most=st.integers(1, 16), student=st.sampled_from([3, 6]), micro_batch=st.sampled_from([1, 8]))
@example(wanted=Layout(), most=1, student=3, micro_batch=8)
def test_the_nearest_layout_always_runs(wanted: Layout, most: int, student: int, micro_batch: int) -> None:
    settings = recipe(micro_batch=micro_batch, **{"distillation.student.num_hidden_layers": student})
    best = nearest_legal(settings, wanted, most)
    assert broken_rule(settings, best) is None
    assert best.gpus <= most
    if broken_rule(settings, wanted) is None and wanted.gpus <= most:
        assert best == wanted, "what already works is its own nearest"

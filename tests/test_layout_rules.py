"""Which layouts run, what is told about those that do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.config import PipelineFields
from ray_pipeline.config_load import load_config
from ray_pipeline.errors import UserError
from ray_pipeline.layout_rules import (
    Layout,
    broken_rule,
    device_notice,
    nearest_legal,
    resolve_layout,
    with_layout,
)


def config(**layout: int | str) -> PipelineFields:
    backend = layout.pop("backend", "auto")
    return load_config(None, {"backend": backend, **{f"layout.{key}": value for key, value in layout.items()}})


def refusal(gpus_available: int = 0, **layout: int | str) -> str:
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


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"gpus": 4, "pp_size": 3}, "is 3 ranks, not 4"),
        ({"gpus": 9, "pp_size": 9}, "pp_size=9: more ranks than layers (model.num_hidden_layers=6)"),
        ({"gpus": 4, "pp_size": 4}, "(distillation.student.num_hidden_layers=3)"),
        ({"gpus": 3}, "dp_size=3: pretrain.batch_size=8 rows cannot be shared evenly"),
        ({"gpus": 2, "tp_size": 2}, "tensor parallelism is not in it"),
        ({"gpus": 2, "sp_size": 2}, "sequence parallelism is not in it"),
        ({"gpus": 2, "ep_size": 2}, "expert parallelism is not in it"),
        ({"gpus": 2, "zero_stage": 2}, "zero_stage=2: this engine shards optimizer state"),
        ({"gpus": 2, "zero_stage": 3}, "zero_stage=3"),
    ],
)
def test_a_layout_that_breaks_a_rule_is_told_why_and_what_works(layout: dict, expected: str) -> None:
    text = refusal(**layout)
    assert expected in text
    assert "Nearest layout that works: --gpus" in text


def test_gpus_that_are_not_there() -> None:
    assert "no GPU that PyTorch can use" in refusal(0, gpus=1, backend="cuda")
    text = refusal(1, gpus=3, pp_size=3)
    assert "gpus=3: this machine has 1 GPU. Use --gpus 1, or --backend cpu" in text
    assert "has 2 GPUs" in refusal(2, gpus=3, backend="cuda")


def test_modal_needs_no_gpu_here() -> None:
    assert resolve_layout(config(gpus=3, pp_size=3, backend="modal"), 0) == Layout(gpus=3, pp=3, device="cuda")


def test_with_layout_fills_in_every_size() -> None:
    settings = config(gpus=4, pp_size=2)
    filled = with_layout(settings, resolve_layout(settings, 0)).layout
    assert (filled.gpus, filled.pp_size, filled.dp_size) == (4, 2, 2)
    assert filled.micro_batch == settings.layout.micro_batch


@given(
    gpus=st.integers(1, 12),
    pp=st.integers(1, 12),
    dp=st.integers(1, 12),
    zero=st.integers(0, 3),
    tp=st.integers(1, 2),
    most=st.integers(1, 12),
)
def test_the_nearest_layout_always_runs(gpus: int, pp: int, dp: int, zero: int, tp: int, most: int) -> None:
    settings = PipelineFields()
    wanted = Layout(gpus=gpus, pp=pp, dp=dp, tp=tp, zero_stage=zero)
    best = nearest_legal(settings, wanted, most)
    assert broken_rule(settings, best) is None
    assert best.gpus <= most
    if broken_rule(settings, wanted) is None and gpus <= most:
        assert best == wanted, "what already works is its own nearest"

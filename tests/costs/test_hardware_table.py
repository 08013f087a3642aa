"""Devices by name."""

from __future__ import annotations

import pytest

from ray_pipeline.costs.hardware_table import NAMES, default_hardware, find_hardware, for_ranks
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import PipelineFields


@pytest.mark.parametrize("name", NAMES)
def test_every_device_is_found_with_sensible_figures(name: str) -> None:
    device = find_hardware(name)
    assert 0 < device.fp32 <= device.bf16
    assert 0 < device.inter <= device.intra
    assert device.reserved < device.memory
    assert 0 < device.achieved < 1


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("H100", "h100"), ("H100!", "h100"), ("h100:8", "h100"), ("A100-80GB", "a100-80gb"), ("a100", "a100-80gb")],
)
def test_spellings_that_modal_takes(spelling: str, name: str) -> None:
    assert find_hardware(spelling).name == name


def test_an_unknown_device_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r'--hardware h20: not in the table \(did you mean "h200"\?\)\. It has a100'):
        find_hardware("h20")


def test_the_settings_name_the_default_device() -> None:
    config = PipelineFields()
    assert default_hardware(config).name == "h100"
    assert default_hardware(config.model_copy(update={"backend": "cpu"})).name == "cpu"
    rented = config.model_copy(update={"modal": config.modal.model_copy(update={"gpu_type": "L40S"})})
    with pytest.raises(UserError, match="modal.gpu_type=L40S: not in the table.*Name one with --hardware"):
        default_hardware(rented)


def test_ranks_share_a_cpu_but_not_a_gpu() -> None:
    cpu, gpu = find_hardware("cpu"), find_hardware("h200")
    assert for_ranks(gpu, 8) == gpu
    assert for_ranks(cpu, 4).memory == cpu.memory // 4
    assert for_ranks(cpu, 4).peak(bf16=True) == cpu.bf16 / 4

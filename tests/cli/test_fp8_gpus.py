"""`precision: fp8` on GPUs without its tensor cores is refused before one is taken, or by its rank."""

from __future__ import annotations

import pytest
import torch

from ray_pipeline.cli import main
from ray_pipeline.errors import UserError
from ray_pipeline.hardware import Gpu, computes_fp8
from ray_pipeline.training import rank as ranks
from tests.cli.test_run import Recorder, seen  # noqa: F401  (a fixture)

ASKED = ["run", "--set", "pretrain.precision=fp8", "--until", "pretrain"]


@pytest.mark.parametrize(
    ("name", "can"),
    [
        ("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", True), ("NVIDIA H800", True), ("H100", True),
        ("NVIDIA A100-SXM4-80GB", False), ("NVIDIA L4", False), ("Tesla V100-SXM2-16GB", False), ("NVIDIA B200", False),
    ],
)  # fmt: skip
def test_hopper_has_the_tensor_cores(name, can):
    assert computes_fp8(name) is can


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, seen: Recorder, tmp_path):  # noqa: F811
    """`on(GPU, *options)`: what `run` answers on a machine with one such GPU."""

    def answer(name: str, *options: str) -> int:
        monkeypatch.setattr("ray_pipeline.hardware.count_gpus", lambda: 1)
        monkeypatch.setattr("ray_pipeline.hardware.gpus", lambda: [Gpu(name, 80.0, "8.0")])
        return main([*ASKED, *options, "--output-dir", str(tmp_path)])

    return answer


def test_an_a100_is_refused_with_the_ways_out(on, seen: Recorder, capsys):  # noqa: F811
    assert on("NVIDIA A100-SXM4-80GB") == 2 and not seen.requests
    said = capsys.readouterr().err
    assert "pretrain.precision=fp8: NVIDIA A100-SXM4-80GB has no tensor cores" in said
    assert "precision=bf16" in said and "layout.emulate_fp8=true" in said


def test_a_hopper_starts_and_so_does_what_was_asked_for_with_open_eyes(on, seen: Recorder):  # noqa: F811
    assert on("NVIDIA H100 80GB HBM3") == 0
    assert on("NVIDIA A100-SXM4-80GB", "--set", "layout.emulate_fp8=true") == 0
    assert on("NVIDIA A100-SXM4-80GB", "--backend", "cpu") == 0
    assert len(seen.requests) == 3


def test_a_kind_that_modal_rents_is_refused_too(seen: Recorder, tmp_path, capsys):  # noqa: F811
    modal = ["--backend", "modal", "--gpu-type", "A100-80GB", "--yes"]
    assert main([*ASKED, *modal, "--output-dir", str(tmp_path)]) == 2
    assert "A100-80GB has no tensor cores" in capsys.readouterr().err


def test_a_rank_looks_at_what_its_gpu_does(monkeypatch):
    monkeypatch.setattr(ranks, "kernel_for", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(UserError, match=r"sft.precision=fp8: Some GPU has no tensor cores"):
        ranks._check_fp8("sft", torch.device("cuda", 0))
    monkeypatch.setattr(ranks, "kernel_for", lambda device: True)
    ranks._check_fp8("sft", torch.device("cuda", 0))

"""What doctor concludes from a machine's facts, and that asking this machine works."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from modal_gpu.image import declared_dependencies
from ray_pipeline import hardware
from ray_pipeline.cli import main
from ray_pipeline.cli.diagnosis import Facts, diagnose
from ray_pipeline.hardware import Gpu

GOOD = Facts(
    system={"system": "Linux", "machine": "x86_64", "python": "3.11.7"},
    packages=dict.fromkeys(hardware.PACKAGES, "1.0") | {name: f"{v}.0" for name, v in hardware.TESTED.items()},
    gpus=[Gpu("NVIDIA H100", 79.6, "9.0")] * 2,
    torch={"cuda_build": "12.8", "cuda_available": True, "nccl": "2.27.3", "gloo": True, "bf16_gpu": True},
    cpus=16,
    memory_gib=64.0,
    memory_free_gib=60.0,
    disk_free_gib=500.0,
    output_dir="/runs",
    write_error=None,
    network=dict.fromkeys(hardware.HOSTS, True),
    keys={"WANDB_API_KEY": True, "HF_TOKEN": True, "MODAL_TOKEN": True},
    driver=True,
)


def test_a_good_machine_lacks_nothing() -> None:
    found = diagnose(GOOD)
    assert found.missing == [] and found.advice == []
    assert any("2 GPU rank(s) over NCCL: run --gpus 2" in line for line in found.works)
    assert any("--backend modal" in line for line in found.works)
    assert "Weights & Biases online" in found.works
    assert any('the reward "code"' in line for line in found.works)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"packages": GOOD.packages | {"ray": None}}, "packages ray: run ./scripts/setup"),
        ({"write_error": "Permission denied"}, "/runs: cannot be written (Permission denied)"),
        ({"disk_free_gib": 0.5}, "disk: 0.5 GiB free"),
        ({"memory_free_gib": 1.0}, "memory: 1.0 GiB available"),
        ({"torch": GOOD.torch | {"gloo": False}}, "gloo: this PyTorch has none"),
    ],
)
def test_something_essential_missing_is_told(change: dict, expected: str) -> None:
    assert expected in "\n".join(diagnose(replace(GOOD, **change)).missing)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"gpus": [], "driver": False}, "rent GPUs with --backend modal"),
        ({"gpus": [], "torch": GOOD.torch | {"cuda_build": None}}, "PyTorch is a CPU build"),
        ({"gpus": []}, "compare the driver's version in nvidia-smi"),
        ({"torch": GOOD.torch | {"nccl": None}}, "NCCL is missing"),
        ({"torch": GOOD.torch | {"bf16_gpu": False}}, "precision: fp32"),
        ({"network": dict.fromkeys(hardware.HOSTS, False)}, "no way to huggingface.co"),
        ({"keys": dict.fromkeys(GOOD.keys, False)}, "modal token new"),
        ({"keys": dict.fromkeys(GOOD.keys, False)}, "wandb login"),
        ({"packages": GOOD.packages | {"xllamacpp": None}}, "ray-pipeline[llama]"),
        ({"packages": GOOD.packages | {"torch": "3.0.1"}}, "torch 3.0.1: not tested"),
        ({"sandbox": "its kernel has no Landlock"}, "its kernel has no Landlock"),
    ],
)
def test_what_is_not_essential_is_advice(change: dict, expected: str) -> None:
    found = diagnose(replace(GOOD, **change))
    assert found.missing == []
    assert expected in "\n".join(found.advice)


def test_tested_releases_are_those_that_are_pinned_and_allowed() -> None:
    pins = dict(line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line)
    assert hardware.untested(pins) is None
    allowed = {r.name: r.specifier for r in map(Requirement, declared_dependencies())}
    for name in hardware.TESTED:
        assert allowed[name].contains(pins[name]) and any(bound.operator == "<" for bound in allowed[name])
    line = hardware.untested(pins | {"ray": "2.61.0", "torch": "2.130.0+cpu"})
    assert line is not None and line.startswith("torch 2.130.0+cpu, ray 2.61.0: not tested with this program")
    assert line.endswith('pip install "torch==2.13.*" "ray==2.60.*"')


def test_doctor_and_verify_cuda_look_at_this_machine(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware, "reachable", lambda host, timeout: False)
    for verb in ("doctor", "verify-cuda"):
        code = main([verb, "--json", "--output-dir", str(tmp_path)])
        facts = json.loads(capsys.readouterr().out)
        assert code == (0 if facts["ok"] else 1)
        assert facts["cpus"] >= 1 and facts["memory_gib"] > 0 and facts["torch"]["gloo"]
        assert facts["network"] == dict.fromkeys(hardware.HOSTS, False)
    main(["doctor", "--output-dir", str(tmp_path)])
    assert "CPU ranks over gloo" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_doctor_fails_where_nothing_can_be_written(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware, "reachable", lambda host, timeout: False)
    monkeypatch.setattr(hardware, "write_error", lambda folder: "Read-only file system")
    assert main(["doctor", "--output-dir", str(tmp_path)]) == 1
    assert "Read-only file system" in capsys.readouterr().out


def test_a_host_that_never_answers_does_not_hold_doctor_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    monkeypatch.setattr(hardware, "reachable", lambda host, timeout: threading.Event().wait(30))
    start = time.monotonic()
    assert hardware.network(timeout=0.2) == dict.fromkeys(hardware.HOSTS, False)
    assert time.monotonic() - start < 5


def test_keys_are_found_in_variables_and_files_and_never_shown(tmp_path: Path) -> None:
    assert hardware.keys({}, tmp_path) == {"WANDB_API_KEY": False, "HF_TOKEN": False, "MODAL_TOKEN": False}
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret")
    (tmp_path / ".modal.toml").write_text("[default]")
    found = hardware.keys({"HF_TOKEN": "secret"}, tmp_path)
    assert found == {"WANDB_API_KEY": True, "HF_TOKEN": True, "MODAL_TOKEN": True}


def test_disk_and_rights_are_those_of_the_nearest_existing_folder(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    assert hardware.existing_parent(deep) == tmp_path
    assert hardware.disk_gib(deep) > 0
    assert hardware.write_error(deep) is None
    assert not deep.exists()
    assert hardware.write_error(Path("/proc")) is not None

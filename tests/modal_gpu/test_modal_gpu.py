"""Modal without an account: the function's facts, its body run here, files up and down, and refusals."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import IO

import modal
import pytest
from modal.config import config as modal_settings

from modal_gpu.app import HF_CACHE, RUNS, configured, pipeline
from modal_gpu.files import fetch, local_inputs, remote_name
from modal_gpu.image import build_image, declared_dependencies, pinned
from modal_gpu.launch import execute_on_modal, upload
from ray_pipeline.cli import main
from ray_pipeline.dag.ledger import RunFile
from ray_pipeline.dag.request import RunRequest
from ray_pipeline.errors import UserError
from ray_pipeline.layout.choice import resolve_layout
from ray_pipeline.settings.loading import config_yaml, load_config
from ray_pipeline.settings.schema import ModalConfig

STAGES = {"only": None, "from_": None, "until": None}


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(modal_settings, "get", lambda *_, **__: None)


def test_function_has_the_gpus_volumes_time_and_secret_of_the_config() -> None:
    settings = ModalConfig(gpu_type="A100-80GB", timeout_seconds=7200, volume="v", hf_cache_volume="h")
    facts = configured(settings, 3, wandb=True).info()
    assert facts.gpus == [("A100-80GB", 3)]
    assert facts.timeout == 7200
    assert facts.max_retries == 3, "a container that was taken away starts again and resumes"
    assert {place: volume.name for place, volume in facts.volumes.items()} == {RUNS: "v", HF_CACHE: "h"}
    assert facts.secrets == ["modal.Secret.from_name('wandb')"]
    assert configured(settings, 1, wandb=False).info().secrets == []


def test_image_pins_every_dependency_to_the_version_here() -> None:
    assert isinstance(build_image(), modal.Image)
    pins = [pinned(text) for text in declared_dependencies()]
    assert f"ray[data,default,train]=={importlib.metadata.version('ray')}" in pins
    assert "torch==" + importlib.metadata.version("torch").partition("+")[0] in pins
    assert not any("+" in pin for pin in pins), "a local build such as +cpu is on no index"


def test_body_plans_the_run_here(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = config_yaml(load_config(None, {"run_name": "toy", "backend": "cpu"}))
    result = pipeline.local(text, STAGES, "unused", str(tmp_path), True)
    assert (result.exit_code, result.error) == (0, None)
    shown = capsys.readouterr().out
    assert "pretrain" in shown and "export" in shown
    assert list(tmp_path.glob("**/*.yaml")) == []


def test_body_hands_a_users_mistake_back(tmp_path: Path) -> None:
    text = config_yaml(load_config(None, {"run_name": "toy", "backend": "cpu", "layout.pp_size": 9}))
    result = pipeline.local(text, STAGES, "unused", str(tmp_path), True)
    assert result.exit_code == 2
    assert "more ranks than layers" in (result.error or "")


def refusal(capsys: pytest.CaptureFixture, tmp_path: Path, *flags: str) -> str:
    assert main(["run", "--backend", "modal", "--output-dir", str(tmp_path), *flags]) == 2
    assert list(tmp_path.iterdir()) == []
    return capsys.readouterr().err


def test_without_credentials_it_says_how_to_get_them(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    text = refusal(capsys, tmp_path, "--gpus", "3", "--pp-size", "3", "--gpu-type", "H100")
    assert "modal token new" in text and "https://modal.com" in text


def test_what_modal_cannot_place_is_refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert 'no such GPU (did you mean "H100"?)' in refusal(capsys, tmp_path, "--gpu-type", "h10")
    assert "at most 8 GPUs" in refusal(capsys, tmp_path, "--gpus", "16", "--dp-size", "16", "--batch-size", "16")
    assert "more ranks than layers" in refusal(capsys, tmp_path, "--gpus", "7", "--pp-size", "7")


def test_a_dry_run_needs_no_account(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    settings = {"backend": "modal", "layout.gpus": 3, "layout.pp_size": 3, "output_dir": str(tmp_path), "run_name": "a"}
    config = load_config(None, settings)
    assert execute_on_modal(RunRequest(config, resolve_layout(config, 0), dry_run=True)) == 0
    assert "would rent H100 x 3" in capsys.readouterr().out


class FakeUpload:
    """Collects what is put on a volume."""

    def __init__(self) -> None:
        self.put: dict[str, Path] = {}

    def __enter__(self) -> FakeUpload:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def put_file(self, path: Path, place: str) -> None:
        self.put[place] = path

    put_directory = put_file

    def batch_upload(self, *, force: bool) -> FakeUpload:
        assert force
        return self


def test_local_inputs_go_up_under_their_content(tmp_path: Path) -> None:
    text, table = tmp_path / "a.txt", tmp_path / "chats.jsonl"
    text.write_text("one")
    table.write_text("{}")
    overrides = {
        "data.pretrain": [{"name": str(text), "weight": 2}, {"name": "org/set:train:text", "weight": 1}],
        "data.sft": f"{table}:messages",
    }
    config = load_config(None, overrides)
    assert local_inputs(config) == {str(text): text, f"{table}:messages": table}
    volume = FakeUpload()
    remote = upload(config, volume)  # type: ignore[arg-type]
    assert set(volume.put.values()) == {text, table}
    assert remote.backend == "cuda"
    assert [source.name for source in remote.data.pretrain] == [f"{RUNS}/{remote_name(text)}", "org/set:train:text"]
    assert remote.data.pretrain[0].weight == 2
    assert remote.data.sft == f"{RUNS}/{remote_name(table)}:messages"
    before = remote_name(text)
    text.write_text("two")
    assert remote_name(text) != before


def test_an_input_that_changes_while_it_goes_up_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")

    class Changing(FakeUpload):
        def put_file(self, path: Path, place: str) -> None:
            path.write_text("two lines")

    with pytest.raises(UserError, match=r"a\.txt: changed while it was uploaded\. Run the same command again"):
        upload(load_config(None, {"data.pretrain": [{"name": str(text)}]}), Changing())  # type: ignore[arg-type]


class FakeVolume:
    """A volume in memory."""

    def __init__(self, content: dict[str, bytes]):
        self.content, self.reads = content, 0

    def files(self, folder: str) -> list[tuple[str, int, int]]:
        return [(path, len(data), 1_700_000_000) for path, data in self.content.items()]

    def read(self, path: str, into: IO[bytes]) -> None:
        self.reads += 1
        into.write(self.content[path])


def test_outputs_come_down_once_without_checkpoints(tmp_path: Path) -> None:
    RunFile(tmp_path / "there").save()
    run_file = (tmp_path / "there" / "run.json").read_bytes()
    volume = FakeVolume(
        {
            "toy/config.yaml": b"seed: 0",
            "toy/run.json": run_file,
            "toy/sft-12/model/model.safetensors": b"weights",
            "toy/sft-12/checkpoints/step_1/shard": b"large",
        }
    )
    assert fetch(volume, "toy", tmp_path) == (3, 14 + len(run_file))
    assert (tmp_path / "toy/sft-12/model/model.safetensors").read_bytes() == b"weights"
    assert not (tmp_path / "toy/sft-12/checkpoints").exists()
    assert fetch(volume, "toy", tmp_path) == (0, 0)
    os.utime(tmp_path / "toy/config.yaml", (1, 1))
    assert fetch(volume, "toy", tmp_path) == (1, 7)
    RunFile(tmp_path / "other" / "toy").save()
    with pytest.raises(UserError, match=r"toy: holds another run of this name.* another --output-dir"):
        fetch(volume, "toy", tmp_path / "other")
    assert [path.name for path in (tmp_path / "other" / "toy").iterdir()] == ["run.json"]

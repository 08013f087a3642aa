"""Files up and down, the image, and the shapes that runs are cut into; no service."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import IO

import modal
import pytest

from modal_gpu.files import fetch, local_inputs, remote_name, send_run, upload
from modal_gpu.gpus import CPU, TYPES, Shape, gpu_types
from modal_gpu.image import CUDA_IMAGE, build_image, declared_dependencies, needed_extras, pinned
from modal_gpu.volume_sync import SUMS, read_sums, write_sums
from ray_pipeline.costs.prices import price
from ray_pipeline.dag.ledger import Record, RunFile, begin_record, close_record
from ray_pipeline.errors import UserError
from ray_pipeline.settings.loading import load_config


def test_image_pins_every_dependency_to_the_version_here() -> None:
    assert isinstance(build_image(load_config(None, {})), modal.Image)
    pins = [pinned(text) for text in declared_dependencies(["llama"])]
    assert f"ray[data,default,train,tune]=={importlib.metadata.version('ray')}" in pins
    assert "torch==" + importlib.metadata.version("torch").partition("+")[0] in pins
    assert not any("+" in pin for pin in pins), "a local build such as +cpu is on no index"
    assert any(pin.startswith("xllamacpp==") for pin in pins)


def test_image_has_the_cuda_that_the_wheels_are_built_for() -> None:
    dockerfile = Path(__file__).resolve().parents[2] / "Dockerfile"
    assert CUDA_IMAGE in dockerfile.read_text(), "both images stand on the same one"


def test_extras_are_those_that_the_settings_use() -> None:
    assert needed_extras(load_config(None, {"export.gguf": []})) == []
    changes = {"export.gguf": [], "data.prompts": "reasoning_gym:chain_sum", "tracking.mlflow": True}
    assert needed_extras(load_config(None, changes)) == ["gym", "mlflow"]


def test_shapes_and_what_they_are_called() -> None:
    assert Shape(("H100",), 1, 3).gpu() == "H100:3"
    assert Shape(("H100", "A100-80GB"), 1, 2).gpu() == ["H100:2", "A100-80GB:2"]
    assert Shape(("CPU",), 1, 3).gpu() is None
    assert Shape(("H100",), 2, 8).describe() == "16 x H100 on 2 hosts"
    assert [found.name for found in gpu_types("h100!, l40s")] == ["H100!", "L40S"]


def test_every_type_that_is_rented_has_a_price_but_one_that_nobody_quotes() -> None:
    rented = [found.name for found in TYPES if found.name != CPU]
    without = [n for n in rented if price(load_config(None, {"backend": "modal", "modal.gpu_type": n})) is None]
    assert without == ["B300"]


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

    def listdir(self, folder: str, *, recursive: bool) -> list[object]:
        raise FileNotFoundError(folder)


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
    there = upload(config, volume, "/runs")
    assert set(volume.put.values()) == {text, table}
    assert [source.name for source in there.data.pretrain] == [f"/runs/{remote_name(text)}", "org/set:train:text"]
    assert there.data.pretrain[0].weight == 2
    assert there.data.sft == f"/runs/{remote_name(table)}:messages"
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
        upload(load_config(None, {"data.pretrain": [{"name": str(text)}]}), Changing(), "/runs")


class FakeVolume:
    """A volume in memory."""

    def __init__(self, content: dict[str, bytes]):
        self.content, self.reads = content, 0

    def files(self, folder: str) -> list[tuple[str, int, int]]:
        return [(path, len(data), 1_700_000_000) for path, data in self.content.items()]

    def read(self, path: str, into: IO[bytes]) -> None:
        self.reads += 1
        if path not in self.content:
            raise FileNotFoundError(path)
        into.write(self.content[path])


def on_a_volume(folder: Path) -> FakeVolume:
    """A run with a finished and an unfinished stage."""
    RunFile(folder).save()
    for name, text in {
        "config.yaml": "seed: 0", "sft-12/model/model.safetensors": "weights", "sft-12/checkpoints/step_1/shard": "old",
        "grpo-34/metrics.jsonl": "{}", "grpo-34/checkpoints/step_1/shard": "one",
        "grpo-34/checkpoints/step_2/shard": "two",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_sums(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return FakeVolume({f"toy/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files})


def test_outputs_come_down_once_checked_without_checkpoints(tmp_path: Path) -> None:
    volume = on_a_volume(tmp_path / "there")
    found = fetch(volume, "toy", tmp_path)
    assert (found.files, found.checked) == (4, 4)
    assert (tmp_path / "toy/sft-12/model/model.safetensors").read_text() == "weights"
    assert not list(tmp_path.glob("toy/*/checkpoints"))
    assert fetch(volume, "toy", tmp_path).files == 0
    os.utime(tmp_path / "toy/config.yaml", (1, 1))
    assert fetch(volume, "toy", tmp_path).files == 0, "another time, and the sum says that it is the same"
    (tmp_path / "toy/config.yaml").write_text("seed: 1")
    os.utime(tmp_path / "toy/config.yaml", (1, 1))
    assert fetch(volume, "toy", tmp_path).files == 1


def test_the_newest_checkpoint_of_an_unfinished_stage_can_come_along(tmp_path: Path) -> None:
    fetch(on_a_volume(tmp_path / "there"), "toy", tmp_path, checkpoints=True)
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("toy/*/checkpoints/*/*")]
    assert found == ["toy/grpo-34/checkpoints/step_2/shard"]


def test_what_went_further_here_goes_along_with_its_newest_checkpoint_alone(tmp_path: Path) -> None:
    run_dir = tmp_path / "toy"
    on_a_volume(run_dir)
    done = begin_record(run_dir / "sft-12", Record("sft", "12", "running"))
    close_record(run_dir / "sft-12", done, "done")
    begin_record(run_dir / "grpo-34", Record("grpo", "34", "running"))
    for number in (1, 2):
        checkpoint = run_dir / "grpo-34/checkpoints"
        (checkpoint / f"step_{number}").rename(checkpoint / f"step_{number:08d}")
    up = FakeUpload()
    send_run(FakeVolume({}), up, run_dir)
    assert set(up.put) == {
        "toy/run.json", "toy/sft-12/record.json", "toy/sft-12/model/model.safetensors", "toy/grpo-34/record.json",
        "toy/grpo-34/metrics.jsonl", "toy/grpo-34/checkpoints/step_00000002/shard",
    }  # fmt: skip
    there = FakeVolume({name: path.read_bytes() for name, path in up.put.items()})
    again = FakeUpload()
    send_run(there, again, run_dir)
    assert set(again.put) == {"toy/run.json"}, "nothing goes up twice"


def test_another_run_of_the_name_is_not_replaced(tmp_path: Path) -> None:
    volume = on_a_volume(tmp_path / "there")
    RunFile(tmp_path / "other" / "toy").save()
    with pytest.raises(UserError, match=r"toy: holds another run of this name.* another --output-dir"):
        fetch(volume, "toy", tmp_path / "other")
    assert [path.name for path in (tmp_path / "other" / "toy").iterdir()] == ["run.json"]


def test_sums_follow_what_changes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    write_sums(tmp_path)
    first = read_sums((tmp_path / SUMS).read_bytes())
    (tmp_path / "a").write_text("three")
    (tmp_path / "b").write_text("two")
    write_sums(tmp_path)
    second = read_sums((tmp_path / SUMS).read_bytes())
    assert set(first) == {"a"} and set(second) == {"a", "b"}
    assert first["a"] != second["a"] and second["a"][0] == 5
    assert read_sums(b"{") == {}

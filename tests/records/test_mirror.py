"""A run elsewhere as a folder here: what grows is gone on with, what is replaced is replaced, the rest is not read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import fsspec
import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.records.buckets.bucket import Bucket
from ray_pipeline.records.metrics_file import NewLines
from ray_pipeline.records.mirror import Mirror

WORK = "grpo-cccccccccc"


class Counted:
    """A bucket, with what was read of it."""

    def __init__(self, address: str):
        self.bucket, self.reads = Bucket(address), list[tuple[str, int]]()

    def files(self) -> Mapping[str, tuple[int, object]]:
        return self.bucket.files()

    def read(self, name: str, start: int) -> bytes:
        self.reads.append((name, start))
        return self.bucket.read(name, start)


def put(address: str, **files: str) -> None:
    for name, text in files.items():
        with fsspec.open(f"{address}/{name}", "w") as file:
            file.write(text)


def line(step: int) -> str:
    return f'{{"stage": "grpo", "step": {step}, "time": 0, "train/loss": 1.0}}\n'


@pytest.fixture
def there(request: pytest.FixtureRequest) -> str:
    """A run's folder in a bucket: fsspec's own, in memory."""
    address = f"memory://bucket/{request.node.name}/demo"
    put(address, **{
        "run.json": "{}", "config.yaml": "seed: 0", f"{WORK}/record.json": "{}", f"{WORK}/metrics.jsonl": line(1),
        f"{WORK}/logs/rank-0.jsonl": "{}\n", f"{WORK}/errors/status-0.json": "{}", "notes.txt": "mine",
        f"{WORK}/checkpoints/step_00000002/__0_0.distcp": "w" * 100, f"{WORK}/model/model.safetensors": "w" * 100,
    })  # fmt: skip
    return address


def test_what_shows_progress_is_copied_and_nothing_else(there: str, tmp_path: Path) -> None:
    Mirror(Bucket(there), tmp_path / "demo", there).look()
    found = {path.relative_to(tmp_path / "demo").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {
        "run.json", "config.yaml", f"{WORK}/record.json", f"{WORK}/metrics.jsonl", f"{WORK}/logs/rank-0.jsonl",
        f"{WORK}/errors/status-0.json",
    }  # fmt: skip


def test_lines_that_came_are_read_once_and_a_file_put_in_its_place_from_its_beginning(
    there: str, tmp_path: Path
) -> None:
    source = Counted(there)
    mirror, lines = Mirror(source, tmp_path / "demo", there), NewLines(tmp_path / "demo" / WORK)
    mirror.look()
    assert [one["step"] for one in lines.read()] == [1]
    source.reads.clear()
    mirror.look()
    assert source.reads == [], "nothing has changed"
    long = "".join(map(line, range(1, 21)))
    put(there, **{f"{WORK}/metrics.jsonl": long})
    mirror.look()
    assert [one["step"] for one in lines.read()] == [*range(2, 21)]
    put(there, **{f"{WORK}/metrics.jsonl": long + line(21)})
    source.reads.clear()
    mirror.look()
    assert source.reads == [(f"{WORK}/metrics.jsonl", len(long) - 256)], "the end alone"
    assert [one["step"] for one in lines.read()] == [21]
    put(there, **{f"{WORK}/metrics.jsonl": line(1) + line(2).replace("1.0", "2.0")})
    mirror.look()
    assert [(one["step"], one["train/loss"]) for one in lines.read()] == [(1, 1.0), (2, 2.0)]


def test_what_is_gone_there_goes_here(there: str, tmp_path: Path) -> None:
    mirror = Mirror(Bucket(there), tmp_path / "demo", there)
    mirror.look()
    fsspec.core.url_to_fs(there)[0].rm(f"/bucket/{there.split('/')[3]}/demo/{WORK}", recursive=True)
    mirror.look()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["config.yaml", "run.json"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://bucket/empty", "cannot be read (FileNotFoundError"),
        ("nosuch://bucket/run", "Protocol not known: nosuch. Give an address such as s3://BUCKET/runs/RUN"),
    ],
)
def test_an_address_without_a_run_is_refused(address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        Mirror(Bucket(address), tmp_path, address).look()
    assert said in str(refused.value) and address in str(refused.value)


def test_a_folder_that_is_no_run_is_refused(there: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run \(no run\.json or config\.yaml is there\)"):
        Mirror(Bucket(there.rpartition("/")[0]), tmp_path, "memory://bucket").look()


def test_a_store_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://b/r: Install s3fs to access S3 \(pip install it\)"):
        Bucket("s3://b/r")


def test_a_look_that_fails_is_told_and_the_next_one_tried(there: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ray_pipeline.records.mirror.EVERY", 0.01)
    mirror = Mirror(Bucket(there), tmp_path / "demo", there)
    mirror.look()
    monkeypatch.setattr(mirror.source, "files", lambda: 1 / 0)
    mirror.start()
    while not mirror.trouble:
        time.sleep(0.01)
    assert "ZeroDivisionError" in mirror.trouble
    monkeypatch.undo()
    while mirror.trouble:
        time.sleep(0.01)
    mirror.stop()

"""A run whose folder is in a bucket: killed on one machine, it goes on on another to the same weights."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_pipeline.cli import main
from tests.pipeline.driving import TOY, digests, finish, start

pytestmark = pytest.mark.slow
RUN = ["run", "--config", str(TOY), "--run-name", "toy", "--no-wandb"]


@pytest.fixture(params=["file", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a folder of runs in fsspec's own store on this disk, and in moto's S3, where that is installed."""
    if request.param == "file":
        yield f"file://{tmp_path}/bucket/runs"
        return
    pytest.importorskip("s3fs")
    program = shutil.which("moto_server") or str(Path(sys.executable).with_name("moto_server"))
    if not Path(program).exists():
        pytest.skip("needs moto[server]")
    server = subprocess.Popen([program, "-p", "5123"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": "http://127.0.0.1:5123"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        import s3fs

        for _ in range(100):
            try:
                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("models")
                break
            except OSError:
                time.sleep(0.3)
        yield "s3://models/runs"
    server.kill()
    server.wait()


def on_machine(cache: Path, *words: str, address: str) -> subprocess.Popen:
    """The command line with a cache, and so a copy of the run, of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ray_pipeline.cli", *words, "--output-dir", address]
    cache.mkdir(exist_ok=True)
    with (cache / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def copy_of(cache: Path) -> Path:
    (folder,) = (cache / "ray-pipeline" / "runs").iterdir()
    return folder


def test_it_is_killed_on_one_machine_and_goes_on_on_another_to_the_same_weights(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    finish(start(*RUN, folder=tmp_path / "plain"), tmp_path / "plain")
    first, second = tmp_path / "first", tmp_path / "second"
    process = on_machine(first, *RUN, address=address)
    import fsspec

    store, root = fsspec.core.url_to_fs(address, use_listings_cache=False)
    until = time.monotonic() + 300
    while not any("checkpoints/step_" in name and name.endswith("manifest.json") for name in store.find(root)):
        assert process.poll() is None and time.monotonic() < until, (first / "log").read_text()[-3000:]
        time.sleep(0.2)
    other = on_machine(second, "resume", "toy", address=address)
    assert other.wait(300) == 2 and "is working on this run" in (second / "log").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    store.rm_file(f"{root}/toy/.lease.json")  # or wait for two minutes

    again = on_machine(second, "resume", "toy", address=address)
    assert again.wait(900) in (0, 1), (second / "log").read_text()[-3000:]
    assert "checkpoint at step" in (second / "log").read_text(), "it went on from what was sent"
    assert digests(copy_of(second), "toy") == digests(tmp_path / "plain", "toy")

    # Any verb of a third machine reads it there.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    assert main(["generate", "toy", "Once", "--output-dir", address, "--max-new-tokens", "4"]) == 0
    assert "what is written there goes up with `resume`" in capsys.readouterr().err
    assert not list(copy_of(tmp_path / "third").rglob("*.distcp"))

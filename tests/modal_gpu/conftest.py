"""The stand-in of Modal's service, with this process's client pointed at it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import modal
import pytest

from tests.modal_gpu.containers import Containers, can_contain
from tests.modal_gpu.stand_in import StandIn
from tests.modal_gpu.world import World


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Raises, also where the tests were started in the background of a shell, which lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A fresh service; the call of a method that it does not know fails the test."""
    with StandIn(tmp_path / "modal") as found:
        monkeypatch.setenv("MODAL_SERVER_URL", found.address)
        monkeypatch.setenv("MODAL_TOKEN_ID", "ak-test")
        monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-test")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        modal.Client._set_env_client(None)
        yield found
        modal.Client._set_env_client(None)
    assert found.unknown == []


@pytest.fixture
def containers(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Containers]:
    """Containers that really run what is called, with the volumes mounted below a throw-away folder."""
    if not can_contain():
        pytest.skip("needs unshare")
    mounted = tmp_path / "mnt"
    monkeypatch.setattr("modal_gpu.functions.RUNS", f"{mounted}/runs")
    monkeypatch.setattr("modal_gpu.launch.RUNS", f"{mounted}/runs")
    monkeypatch.setattr("modal_gpu.functions.HF_CACHE", f"{mounted}/hf")
    found = Containers(world)
    yield found
    (tmp_path / "log").write_text(world.text_of())
    found.stop()

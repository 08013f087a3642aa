"""Hosts that train together without a shared disk: shards get the leader's names, and what is not whole is deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from modal_gpu import hosts
from modal_gpu.hosts import News, ask, name_shards, tidy_checkpoints
from ray_pipeline.records.artifacts import manifest_entries, write_sealed
from ray_pipeline.settings.run_folder import MANIFEST


def checkpoint(run_dir: Path, name: str, *files: str) -> Path:
    folder = run_dir / "sft-1" / "checkpoints" / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text(f"{name} {file}")
    return folder


def test_shards_get_the_name_that_the_leader_gave(tmp_path: Path) -> None:
    checkpoint(tmp_path, ".step_00000004.partial", "__8_0.distcp", "__9_0.distcp")
    checkpoint(tmp_path, ".step_00000006.partial", "__8_0.distcp")
    checkpoint(tmp_path, "step_00000002", "__8_0.distcp")
    assert name_shards(tmp_path, ["sft-1/checkpoints/step_00000004"])
    found = sorted(path.relative_to(tmp_path / "sft-1/checkpoints").as_posix() for path in tmp_path.rglob("*.distcp"))
    assert found == [
        ".step_00000006.partial/__8_0.distcp", "step_00000004/__8_0.distcp", "step_00000004/__9_0.distcp",
    ], "the one in flight waits, the one that the leader dropped is gone"  # fmt: skip
    assert not name_shards(tmp_path, ["sft-1/checkpoints/step_00000004"]), "nothing is to be committed twice"


def test_the_leader_tells_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "NEWS_PORT", 26380)
    monkeypatch.setattr(hosts, "BEAT", 0.01)
    assert ask("127.0.0.1") is None
    with News(tmp_path, "127.0.0.1"):
        assert ask("127.0.0.1") == []
        checkpoint(tmp_path, "step_00000004", "__0_0.distcp")
        checkpoint(tmp_path, ".step_00000006.partial", "__0_0.distcp")
        assert ask("127.0.0.1") == ["sft-1/checkpoints/step_00000004"]
    assert ask("127.0.0.1") is None


def test_a_checkpoint_without_all_shards_is_deleted(tmp_path: Path) -> None:
    for name in ("step_00000002", "step_00000004", "step_00000006"):
        folder = checkpoint(tmp_path, name, "__0_0.distcp", "__8_0.distcp")
        write_sealed(folder / MANIFEST, {"files": manifest_entries(folder, folder.glob("__*"))})
    (tmp_path / "sft-1/checkpoints/step_00000004/__8_0.distcp").unlink()
    (tmp_path / f"sft-1/checkpoints/step_00000006/{MANIFEST}").unlink()
    tidy_checkpoints(tmp_path, 1)
    assert len(list(tmp_path.glob("*/checkpoints/*"))) == 3, "one container's are whole, by their names"
    tidy_checkpoints(tmp_path, 2)
    assert [path.name for path in tmp_path.glob("*/checkpoints/*")] == ["step_00000002"]

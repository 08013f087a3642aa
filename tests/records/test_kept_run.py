"""A run in a bucket and its copy: what goes where, in which order, and who may work on it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.records.artifacts import write_sealed, write_text
from ray_pipeline.records.buckets import lease
from ray_pipeline.records.buckets.kept_run import KeptRun
from ray_pipeline.records.buckets.lease import LEASE, Lease, kept
from ray_pipeline.records.progress import stop_reason

WORK, DONE = "sft-aaaaaaaaaa", "pretrain-bbbbbbbbbb"
STEP = f"{WORK}/checkpoints/step_00000002"


def fill(folder: Path, names: list[str], text: str = "x") -> None:
    for name in names:
        write_text(folder / name, f"{name} {text}")


def checkpoint(folder: Path, name: str = STEP) -> None:
    fill(folder, [f"{name}/__0_0.distcp", f"{name}/.metadata"])  # torch's own begins with a dot
    write_sealed(folder / name / "manifest.json", {"files": {"__0_0.distcp": {}, ".metadata": {}}})


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    return f"memory://kept/{request.node.name}"


@pytest.fixture
def run(address: str, tmp_path: Path) -> KeptRun:
    """A run with a finished stage and one at work, only here yet."""
    copy = tmp_path / "here" / "toy"
    fill(copy, ["run.json", "config.yaml", f"{DONE}/model/model.safetensors", f"{DONE}/record.json",
                f"{DONE}/checkpoints/step_00000009/__0_0.distcp", f"{WORK}/record.json", ".lock", "stop.json",
                f"{WORK}/ray/left.txt", f"{WORK}/checkpoints/.step_00000004.partial/__0_0.distcp"])  # fmt: skip
    checkpoint(copy)
    return KeptRun(address, copy)


def elsewhere(run: KeptRun, tmp_path: Path, name: str = "there") -> KeptRun:
    """The same run on another machine."""
    return KeptRun(run.bucket.address.rpartition("/")[0], tmp_path / name / "toy")


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".bucket.json"
    }


def test_another_machine_has_what_it_needs_to_go_on_and_no_more(run: KeptRun, tmp_path: Path) -> None:
    sent = run.push()
    other = elsewhere(run, tmp_path)
    assert not other.copy.exists()
    other.bring(checkpoints=True)
    found = files(other.copy)
    assert found.items() <= files(run.copy).items()
    assert found.keys() == {
        "run.json", "config.yaml", f"{DONE}/model/model.safetensors", f"{DONE}/record.json", f"{WORK}/record.json",
        f"{STEP}/__0_0.distcp", f"{STEP}/.metadata", f"{STEP}/manifest.json",
    }  # fmt: skip
    assert sent == len(found) + 1, "the finished stage's checkpoint lies there, and stays there"
    reader = elsewhere(run, tmp_path, "reader")
    reader.bring(checkpoints=False)
    assert not list(reader.copy.rglob("*.distcp"))


def test_only_what_changed_goes_and_what_is_deleted_goes_there_too(run: KeptRun, tmp_path: Path) -> None:
    run.push()
    assert run.push() == 0 and run.bring(checkpoints=True) == 0
    other = elsewhere(run, tmp_path)
    other.bring(checkpoints=True)
    checkpoint(other.copy, STEP.replace("2", "4"))
    for path in sorted((other.copy / STEP).iterdir()):
        path.unlink()
    fill(other.copy, [f"{WORK}/record.json"], "later")
    assert other.push() == 4
    assert run.bring(checkpoints=True) == 4
    left = {path.relative_to(run.copy).as_posix() for path in (run.copy / WORK / "checkpoints").glob("step*/*")}
    assert left == {f"{STEP.replace('2', '4')}/{name}" for name in ("__0_0.distcp", ".metadata", "manifest.json")}
    assert (run.copy / WORK / "record.json").read_text().endswith("later")


def test_what_vouches_for_others_goes_up_after_them(run: KeptRun, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    put, write = run.bucket.put, run.bucket.write
    monkeypatch.setattr(run.bucket, "put", lambda path, name: (order.append(name), put(path, name)))
    monkeypatch.setattr(run.bucket, "write", lambda name, data: (order.append(name), write(name, data)))
    run.push()
    assert order.index(f"{STEP}/manifest.json") > order.index(f"{STEP}/__0_0.distcp")
    assert order.index(f"{DONE}/record.json") > order.index(f"{DONE}/model/model.safetensors")
    assert order[-1] == "run.json"


def test_a_record_that_is_written_while_files_are_listed_waits(run: KeptRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could vouch there for a model that was not listed yet."""
    walk = run._walk

    def ends_meanwhile() -> Any:
        names = list(walk())
        fill(run.copy, [f"{WORK}/model/model.safetensors"])
        fill(run.copy, [f"{WORK}/record.json"], "done")
        return iter(names)

    monkeypatch.setattr(run, "_walk", ends_meanwhile)
    run.push()
    assert not run.bucket.read(f"{WORK}/record.json", 0).endswith(b"done")
    monkeypatch.undo()
    assert run.push() == 2
    assert run.bucket.read(f"{WORK}/record.json", 0).endswith(b"done")


def test_a_checkpoint_that_is_being_deleted_is_not_vouched_for(run: KeptRun, tmp_path: Path) -> None:
    (run.copy / STEP / "__0_0.distcp").unlink()
    run.push()
    other = elsewhere(run, tmp_path)
    other.bring(checkpoints=True)
    assert not (other.copy / STEP).exists()


def test_two_histories_are_never_mixed(run: KeptRun, tmp_path: Path) -> None:
    run.push()
    other = elsewhere(run, tmp_path)
    other.bring(checkpoints=True)
    fill(other.copy, [f"{WORK}/record.json"], "theirs")
    other.push()
    fill(run.copy, [f"{WORK}/record.json"], "ours")
    with pytest.raises(UserError, match=r"1 files .* never arrived in memory.* gone on from another machine"):
        run.bring(checkpoints=True)
    assert (run.copy / WORK / "record.json").read_text().endswith("ours")


def test_a_store_that_cannot_be_read_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = KeptRun("memory://kept", tmp_path / "toy")
    monkeypatch.setattr(run.bucket._system, "find", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"memory://kept/toy: ZeroDivisionError: division by zero\."):
        run.bring(checkpoints=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"EVERY": 0.05, "LOOK": 0.01, "SETTLES": 0.0}.items():
        monkeypatch.setattr(lease, name, seconds)


def test_one_process_works_on_a_run_at_a_time(run: KeptRun, tmp_path: Path, quick: None) -> None:
    other = elsewhere(run, tmp_path)
    busy = rf"process {os.getpid()} on .* is working on this run\. .* gone in \d+ s"
    with kept(run), pytest.raises(UserError, match=busy):
        Lease(other.bucket).take()
    with kept(other):
        assert files(other.copy), "brought when it had its turn"


def test_a_killed_process_counts_as_gone_when_its_lease_is_over(run: KeptRun, quick: None, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(lease, "SECONDS", -1.0)
        Lease(run.bucket).take()
    with kept(run):
        assert json.loads(run.bucket.read(LEASE, 0))["until"] > 0
    assert LEASE not in run.bucket.everything()


def test_it_is_sent_while_it_is_worked_on_and_at_the_end(run: KeptRun, tmp_path: Path, quick: None) -> None:
    newest = STEP.replace("2", "6")
    with kept(run):
        checkpoint(run.copy, newest)
        for _ in range(1000):
            if f"{newest}/manifest.json" in run.bucket.everything():
                break
            lease.time.sleep(0.01)
        else:
            raise AssertionError("a checkpoint was not sent")
        fill(run.copy, ["report.html"])
    assert "report.html" in run.bucket.everything()


def test_a_store_that_fails_stops_nothing_and_is_told_at_the_end(
    run: KeptRun, quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: object) -> None:
        raise OSError("no route to the store")

    caplog.set_level(logging.WARNING)
    with pytest.raises(StageFailed, match=r"no route.* whole in .*toy\. Send it"), kept(run):
        monkeypatch.setattr(run.bucket, "put", refuses)
        fill(run.copy, ["report.html"])
        lease.time.sleep(0.5)
    assert caplog.text.count("training goes on") == 1


def test_what_ended_the_work_is_told_and_not_the_store(run: KeptRun, quick: None, monkeypatch) -> None:
    monkeypatch.setattr(run, "push", lambda: 1 / 0)
    with pytest.raises(KeyError), kept(run):
        raise KeyError("the stage")


def test_a_run_that_another_process_took_saves_and_stops(run: KeptRun, quick: None) -> None:
    with pytest.raises(StageFailed, match="another process works on it now"), kept(run):
        (run.copy / "stop.json").unlink()
        Lease(run.bucket)._write()
        for _ in range(1000):
            if (run.copy / "stop.json").exists():
                break
            lease.time.sleep(0.01)
        assert stop_reason(run.copy) == f"another process works on {run.bucket.address}"
        fill(run.copy, ["report.html"])
    assert "report.html" not in run.bucket.everything()


def test_a_copy_that_was_killed_while_it_sent_goes_on_from_what_is_here(run: KeptRun, quick: None, monkeypatch) -> None:
    """Its notes are older than both sides."""
    Lease(run.bucket, run.copy_id).take()
    run.bring(checkpoints=True)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_save", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.push()
    fill(run.copy, [f"{WORK}/record.json"], "written after it was sent")
    monkeypatch.setattr(lease.time, "time", lambda: 1e12)  # the lease has run out
    with kept(run):
        pass
    assert run.bucket.read(f"{WORK}/record.json", 0).endswith(b"after it was sent")


def test_a_copy_that_was_killed_while_it_was_brought_is_gone_on_with(run: KeptRun, tmp_path: Path, monkeypatch) -> None:
    run.push()
    other = elsewhere(run, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(other, "_save", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.bring(checkpoints=True)
    again = elsewhere(run, tmp_path)
    again.bring(checkpoints=True)
    assert again.push() == 0


def test_damaged_notes_are_named(run: KeptRun) -> None:
    run.push()
    notes = run.copy / ".bucket.json"
    notes.write_text(notes.read_text().replace("config", "confug", 1))
    with pytest.raises(UserError, match=r"\.bucket\.json: damaged"):
        run.push()


def test_a_store_that_is_gone_at_the_end_hides_nothing(run: KeptRun, quick: None, monkeypatch) -> None:
    with pytest.raises(KeyError), kept(run):
        monkeypatch.setattr(run.bucket, "read", lambda *_: 1 / 0)
        raise KeyError("the stage")

"""metrics.jsonl over a resume; samples."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.metrics_file import MetricsFile, NewLines, damaged_files, read_metrics, read_samples
from ray_pipeline.records.progress import Progress


def tracker(folder: Path, resume_step: int = 0) -> MetricsFile:
    return MetricsFile(folder, "sft", resume_step=resume_step)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_lines_name_stage_step_and_figures(tmp_path):
    log = tracker(tmp_path)
    log.log(5, {"train/loss": 1.5})
    log.close()
    (line,) = read_metrics(tmp_path)
    assert (line["stage"], line["step"], line["train/loss"]) == ("sft", 5, 1.5)


def test_resume_drops_lines_past_the_checkpoint(tmp_path):
    first = tracker(tmp_path)
    for step in range(1, 8):
        first.log(step, {"x": float(step)})
    second = tracker(tmp_path, resume_step=4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    second.log(5, {"x": 5.0})
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_resume_without_a_checkpoint_starts_the_file_again(tmp_path):
    tracker(tmp_path).log(3, {"x": 1.0})
    tracker(tmp_path, resume_step=0)
    assert steps(tmp_path) == []


def test_line_torn_by_a_kill_is_dropped(tmp_path):
    tracker(tmp_path).log(1, {"x": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "st')
    log = tracker(tmp_path, resume_step=1)
    log.log(2, {"x": 2.0})
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_damaged_line_is_left_out_named_and_refused_on_resume(tmp_path, place):
    log = tracker(tmp_path)
    for step in (1, 2, 3):
        log.log(step, {"train/loss": 1.5})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    line = bytearray(lines[1])
    line[int(place * len(line))] ^= 1
    path.write_bytes(b"\n".join([lines[0], bytes(line), *lines[2:]]))
    assert steps(tmp_path) == [1, 3]
    assert damaged_files(tmp_path) == [f"{path}: damaged in line 2, left out"]
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged in line 2\. Delete that line \(sed -i 2d "):
        tracker(tmp_path, resume_step=3)


def test_damaged_samples_and_progress_are_named(tmp_path):
    write_sealed(tmp_path / "samples.json", {"samples": [{"prompt": "2+2?"}]})
    Progress(tmp_path, "sft", 3)
    assert damaged_files(tmp_path) == [] and read_samples(tmp_path) == [{"prompt": "2+2?"}]
    for name in ("samples.json", "progress.json"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes().replace(b"s", b"q", 1))
    found = damaged_files(tmp_path)
    assert len(found) == 2 and "samples.json: damaged" in found[0] and "progress.json: damaged" in found[1]


def test_an_evaluation_that_is_taken_again_is_logged_once(tmp_path):
    first = tracker(tmp_path)
    for step in (2, 4):
        first.log(step, {"train/loss": 1.0})
        first.log(step, {"val/accuracy": 0.5})
    again = MetricsFile(tmp_path, "sft", resume_step=4, evaluated=False)
    assert [(line["step"], "val/accuracy" in line) for line in read_metrics(tmp_path)] == [
        (2, False), (2, True), (4, False)
    ]  # fmt: skip
    again.log(4, {"val/accuracy": 0.5})
    assert steps(tmp_path) == [2, 2, 4, 4]


def test_a_disk_that_is_full_costs_lines_but_neither_training_nor_the_lines_around(tmp_path, monkeypatch, caplog):
    log, write = tracker(tmp_path), os.write

    def full(file: int, data: bytes) -> int:
        write(file, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    log.log(1, {"x": 1.0})
    monkeypatch.setattr(os, "write", full)
    log.log(2, {"x": 1.0})
    log.log(3, {"x": 1.0})
    monkeypatch.setattr(os, "write", write)
    log.log(4, {"x": 1.0})
    log.close()
    assert steps(tmp_path) == [1, 4] and damaged_files(tmp_path) == []
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "No space left on device" in said[0] and "2 lines of figures" in said[1]


def test_names_of_older_versions_are_read_as_those_of_today(tmp_path):
    line = '{"stage": "sft", "step": 5, "time": 0, "eval/accuracy": 0.5, "tokens_per_second": 9.0}'
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    (found,) = read_metrics(tmp_path)
    assert found["val/accuracy"] == 0.5 and found["perf/tokens_per_second"] == 9.0


def test_new_lines_come_once_and_those_of_a_file_in_its_place_from_the_beginning(tmp_path):
    lines = NewLines(tmp_path)
    assert list(lines.read()) == []
    log = tracker(tmp_path)
    for step in (1, 2, 3):
        log.log(step, {"x": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "st')
    assert [line["step"] for line in lines.read()] == [1, 2, 3] and list(lines.read()) == []
    tracker(tmp_path, resume_step=2).log(3, {"x": 1.0})
    assert [line["step"] for line in lines.read()] == [1, 2, 3]

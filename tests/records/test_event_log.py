"""What processes tell, as lines with rank, stage, step and phase."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from ray_pipeline.launch.rank_errors import RankStatus
from ray_pipeline.records.event_log import EventFiles, event_text, recorded

LOG = logging.getLogger("ray_pipeline.tests")
ORIGIN = {"pp": 0, "dp": 0, "sp": 0, "tp": 0}


def events(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs" / f"{name}.jsonl").read_text().splitlines()]


def test_what_is_logged_and_printed_has_rank_stage_step_and_phase(tmp_path):
    folder = tmp_path / "sft-abc"
    before = sys.stdout, sys.stderr, logging.getLogger("ray_pipeline").level
    with recorded(folder, "rank-3"):
        status = RankStatus(folder, 3, ORIGIN, "sft")
        status.at("forward/backward", 7)
        print("half a ", end="")
        print("line")
        LOG.warning("look %s", "here")
    assert before == (sys.stdout, sys.stderr, logging.getLogger("ray_pipeline").level)
    told = events(folder, "rank-3")
    assert [event["message"] for event in told] == ["half a line", "look here"]
    assert told[0]["printed"] and told[1]["level"] == "warning"
    assert all(
        (event["rank"], event["stage"], event["step"], event["phase"]) == (3, "sft", 7, "forward/backward")
        for event in told
    )


def test_spans_are_told_at_level_debug_with_their_seconds(tmp_path):
    folder = tmp_path / "sft-abc"
    with recorded(folder, "rank-0", "debug"):
        status = RankStatus(folder, 0, ORIGIN, "sft")
        status.at("forward/backward", 7)
        status.at("optimizer step")
        LOG.warning("now")
    spans = [event for event in events(folder, "rank-0") if "seconds" in event]
    assert [(event["message"], event["step"]) for event in spans[-2:]] == [("starting", None), ("forward/backward", 7)]
    assert all(event["seconds"] >= 0 and event["stage"] == "sft" for event in spans)
    assert status.take_seconds().keys() >= {"forward/backward"} and status.take_seconds() == {}


def test_files_of_all_ranks_are_read_once_in_the_order_of_time(tmp_path):
    folder = tmp_path / "sft-abc"
    files, one = EventFiles(folder), EventFiles(folder, "rank-1")
    assert files.read() == []
    for number, name in enumerate(["rank-1", "rank-0", "rank-1"]):
        with recorded(folder, name):
            LOG.info("message %d", number)
    with (folder / "logs" / "rank-1.jsonl").open("a") as file:
        file.write('{"time": 1, "torn')
    assert [event["message"] for event in files.read()] == ["message 0", "message 1", "message 2"]
    assert files.read() == []
    assert [event["message"] for event in one.read()] == ["message 0", "message 2"]


def test_an_event_as_people_read_it():
    event = {"time": 0.0, "level": "warning", "rank": 3, "stage": "sft", "step": 12, "phase": "x", "message": "it rose"}
    assert event_text(event)[8:] == " rank 3  sft step 12  warning: it rose"

"""The bubble is what a rank does not compute between the first action of any rank and the last."""

from __future__ import annotations

import pytest

from ray_pipeline.records.artifacts import write_json
from ray_pipeline.report.step_picture import step_picture
from ray_pipeline.settings.run_folder import TIMELINE_FILE

PLACE = {"pp": 0, "dp": 0, "sp": 0, "tp": 0}


def test_the_bubble_is_the_idle_share_of_the_ranks(tmp_path):
    first = [["next batch", 90, 99], ["wait", 99, 100], ["F", 100, 101], ["wait", 101, 103], ["B", 103, 105]]
    second = [["next batch", 90, 98], ["wait", 98, 101], ["F", 101, 102], ["B", 102, 103], ["optimizer step", 106, 107]]
    ranks = [{"place": PLACE, "spans": first}, {"place": PLACE | {"pp": 1}, "spans": second}]
    write_json(tmp_path / TIMELINE_FILE, {"step": 3, "ranks": ranks, "of": 2, "schedule": "1f1b"})
    picture = step_picture(tmp_path)
    assert picture is not None
    assert [rank["bubble"] for rank in picture["ranks"]] == [0.4, 0.6]
    assert picture["bubble"] == pytest.approx(0.5)
    assert picture["milliseconds"] == 5000 and picture["data_milliseconds"] == 9000
    assert picture["ranks"][1]["spans"] == [["F", 1000, 2000], ["B", 2000, 3000], ["optimizer step", 6000, 7000]]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 3}'])
def test_a_damaged_file_is_no_picture(tmp_path, text):
    (tmp_path / TIMELINE_FILE).write_text(text)
    assert step_picture(tmp_path) is None

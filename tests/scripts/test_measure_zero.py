"""What is read off the runs of measure_zero, and when it says that answers got longer and better."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from scripts.measure_zero import curve, ends, picture, rises, table

LINES = [{"step": step, "grpo/completion_tokens": 10.0 + step, "grpo/accuracy": 0.02 * step} for step in range(1, 21)]


def seed(number: int, last: float) -> dict[str, object]:
    return {
        "seed": number, "seconds": 60.0, "heldout": [(0, 0.1), (10, 0.2), (20, last)],
        "sampled": curve(LINES, "grpo/accuracy"), "tokens": curve(LINES, "grpo/completion_tokens"),
    }  # fmt: skip


def test_a_step_that_was_taken_again_counts_once_as_it_was_last():
    again = [*LINES, {"step": 20, "grpo/accuracy": 0.9}, {"step": 20, "val/accuracy": 0.5}]
    assert curve(again, "grpo/accuracy")[-1] == (20, 0.9) and len(curve(again, "grpo/accuracy")) == 20
    assert curve(again, "val/accuracy") == [(20, 0.5)]


def test_all_three_must_rise():
    assert ends(seed(0, 0.4)["tokens"]) == (13.0, 28.0)
    assert rises(seed(0, 0.4)) and not rises(seed(0, 0.1))
    assert not rises(seed(0, 0.4) | {"tokens": [(1, 30.0), (20, 20.0)]})


def test_the_table_and_the_picture_hold_every_seed():
    seeds = [seed(0, 0.4), seed(1, 0.5)]
    assert "| 1 | 10.0% to 50.0% | 6.0% to 36.0% | 13.0 to 28.0 | 60 |" in table(seeds).splitlines()
    drawn = ElementTree.fromstring(picture({"recipe": "a<b", "hardware": "x", "commit": "0" * 40, "seeds": seeds}))
    assert len([node for node in drawn.iter() if node.tag.endswith("polyline")]) == 4

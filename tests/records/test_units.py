"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.records.units import bytes_text, count_text, number_text, percent, scaled, seconds_text, time_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(671_026_404_352), "671B"),
        (count_text(36.6e9), "36.6B"),
        (count_text(7168), "7.17k"),
        (count_text(12), "12"),
        (bytes_text(76e9), "76 GB"),
        (bytes_text(0), "0 B"),
        (bytes_text(999.6e6), "1 GB"),
        (bytes_text(640_000), "640 kB"),
        (number_text(67_290), "67,290"),
        (number_text(0.12345), "0.1235"),
        (percent(0.6125), "61.3%"),
        (scaled(16.4e18), "16.4 E"),
        (time_text(0.0355), "35.5 ms"),
        (time_text(29.6), "29.6 s"),
        (time_text(86400 * 153), "153 days"),
    ],
)
def test_three_digits_and_a_unit(text: str, expected: str) -> None:
    assert text == expected


@given(st.floats(-1, 1e6))
def test_durations_are_short_and_have_a_unit(seconds):
    text = seconds_text(seconds)
    assert len(text) <= 12
    assert text.endswith((" s", " min"))


def test_durations_at_the_seams():
    assert [seconds_text(s) for s in (59.4, 59.6, 3599.4, 3600)] == ["59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min"]

"""Numbers as people read them."""

from __future__ import annotations

import pytest

from ray_pipeline.costs.units import bytes_text, count_text, scaled, time_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(671_026_404_352), "671B"),
        (count_text(36.6e9), "36.6B"),
        (count_text(7168), "7.17k"),
        (count_text(12), "12"),
        (bytes_text(76e9), "76 GB"),
        (bytes_text(0), "0 B"),
        (scaled(16.4e18), "16.4 E"),
        (time_text(0.0355), "35.5 ms"),
        (time_text(29.6), "29.6 s"),
        (time_text(86400 * 153), "153 days"),
    ],
)
def test_three_digits_and_a_unit(text: str, expected: str) -> None:
    assert text == expected

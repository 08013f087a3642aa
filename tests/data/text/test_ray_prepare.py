"""Blocks spread over processes come back whole and in order, few at a time, whatever dies."""

from __future__ import annotations

import os
import time

import pytest

from ray_pipeline.data.text import ray_prepare
from ray_pipeline.data.text.ray_prepare import AHEAD, map_blocks
from ray_pipeline.launch.local_ray import start_ray


@pytest.fixture(scope="module", autouse=True)
def ray():
    import ray

    if ray.is_initialized():
        ray.shutdown()
    start_ray(num_cpus=2, include_dashboard=False)
    yield ray
    ray.shutdown()


class Square:
    """Slow on even numbers; tells how often one was made in its process."""

    made = 0

    def __init__(self, plus):
        self.plus = plus
        Square.made += 1

    def __call__(self, number):
        time.sleep(0.05 * (number % 2 == 0))
        return number * number + self.plus, Square.made, os.getpid()


class Mortal:
    """Dies the first time it sees a 3."""

    def __init__(self, marker):
        self.marker = marker

    def __call__(self, number):
        if number == 3 and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return number


def test_results_are_in_order_and_a_process_makes_its_tools_once():
    found = list(map_blocks(Square, (7,), range(12)))
    assert [value for value, _, _ in found] == [n * n + 7 for n in range(12)]
    assert {made for _, made, _ in found} == {1}
    assert len({process for _, _, process in found}) == 2
    assert list(map_blocks(Square, (7,), [])) == []


def test_blocks_are_asked_for_as_results_are_taken():
    asked = []
    results = map_blocks(Square, (0,), (asked.append(n) or n for n in range(40)))
    for taken in range(5):
        next(results)
        assert len(asked) <= taken + 1 + AHEAD * 2
    results.close()


def test_no_more_workers_than_one_reader_can_feed(monkeypatch):
    monkeypatch.setattr(ray_prepare, "MOST_WORKERS", 1)
    found = list(map_blocks(Square, (0,), range(8)))
    assert [value for value, _, _ in found] == [n * n for n in range(8)] and len({pid for _, _, pid in found}) == 1


def test_a_process_that_dies_is_started_again_and_its_blocks_are_done_again(tmp_path):
    assert list(map_blocks(Mortal, (tmp_path / "died",), range(8))) == list(range(8))
    assert (tmp_path / "died").exists()

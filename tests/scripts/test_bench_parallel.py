"""The benchmark: what it computes from measurements, what it refuses, and that it runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.errors import UserError
from scripts import bench_parallel
from scripts.parallel_bench import plot, results
from scripts.parallel_bench.processes import CompetitorFailed
from scripts.parallel_bench.task import REFERENCE, Row, full_task, make_batch, quick_task, table

ROOT = Path(__file__).parents[2]
OURS, PEER = Row("ddp", "ours", 2, 2, {"dp": 2}, "torch ddp"), Row("torch ddp", "ddp", 2, 2)


def test_every_row_of_ours_stands_beside_a_peer_that_exists_and_comes_with_it() -> None:
    names = [row.name for row in table()]
    assert len(set(names)) == len(names)
    for row in table():
        assert (row.peer is not None) == (row.kind == "ours")
        assert row.peer is None or row.peer in names
        rows, _ = bench_parallel.choose_rows(row.name, devices=None, deepspeed=True)
        assert {REFERENCE.name, row.name, row.peer or row.name} == {kept.name for kept in rows}


def test_every_step_brings_new_tokens_and_every_micro_batch_is_whole() -> None:
    for task in (full_task(), quick_task()):
        assert not torch.equal(make_batch(task, 0).tokens, make_batch(task, 1).tokens)
        assert torch.equal(make_batch(task, 3).tokens, make_batch(task, 3).tokens)
        for row in table():
            replicas = row.ranks if row.kind in ("ddp", "fsdp2") else row.settings.get("dp", 1)
            assert task.rows % (replicas * row.micro_batch) == 0


def test_the_model_has_ten_to_fifteen_million_parameters() -> None:
    assert 10e6 < full_task().model.num_params() < 15e6


def test_an_unknown_row_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r'--rows zero4: no such row \(did you mean "zero3"\?\). Rows: plain torch'):
        bench_parallel.choose_rows("ddp,zero4", devices=None, deepspeed=True)


def test_without_deepspeed_zero_rows_are_left_out_with_a_notice() -> None:
    rows, notices = bench_parallel.choose_rows("ddp,zero1", devices=None, deepspeed=False)
    assert [row.name for row in rows] == ["plain torch", "torch ddp", "ddp"]
    assert notices == ["zero1 skipped: deepspeed is not installed"]


def test_one_gpu_runs_the_rows_of_one_rank() -> None:
    rows, notices = bench_parallel.choose_rows(None, devices=1, deepspeed=True)
    assert [row.name for row in rows] == ["plain torch", "one process"]
    assert "pp3 zbv skipped: it needs 3 GPUs, there are 1" in notices


@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=20), st.floats(0, 1))
def test_a_percentile_lies_between_the_values(values: list[float], share: float) -> None:
    assert min(values) <= results.percentile(values, share) <= max(values)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_the_fiftieth_percentile_is_the_median(values: list[int]) -> None:
    assert math.isclose(results.percentile(values, 0.5), results.spread(values)["median"])


def test_a_row_that_computes_something_else_is_not_timed() -> None:
    class Rank:
        def losses(self, name: str, steps: int) -> list[tuple[float, float]]:
            return [(5.0 if name == REFERENCE.name else 5.001, 1.0)] * steps

    with pytest.raises(CompetitorFailed, match="torch ddp does not compute what one process does, so nothing is timed"):
        bench_parallel.check({1: Rank(), 2: Rank()}, [REFERENCE, PEER])


def test_nan_is_equal_to_nothing() -> None:
    nan = [(math.nan, 1.0)]
    assert not results.equal_enough(results.differences(nan, nan))
    assert results.equal_enough(results.differences([(5.0, 2.0)], [(5.00001, 2.0001)]))


def entries() -> list[dict]:
    """Peer: 3 s and 2 s of CPU a step; ours: 2 s and 2 s, once 4 s."""
    memory = {name: [{"peak_rss_bytes": 10**9}] * 2 for name in ("ddp", "torch ddp")}
    rounds = {"torch ddp": [[(3.0, 2.0)] * 2] * 3, "ddp": [[(2.0, 2.0)] * 2] * 2 + [[(4.0, 2.0), (2.0, 2.0)]]}
    difference = {"ddp": (1e-8, 1e-7), "torch ddp": (0.0, 0.0)}
    return results.summarise(full_task(), [PEER, OURS], rounds, memory, difference)


def test_speed_is_the_peers_median_over_ours() -> None:
    peer, ours = entries()
    assert "speed_vs_peer" not in peer
    assert (ours["speed_vs_peer"], ours["cpu_vs_peer"], ours["peer"]) == (1.5, 1.0, "torch ddp")
    assert ours["step_ms"] == {"median": 2000.0, "p10": 2000.0, "p90": 3000.0}
    assert ours["speed_vs_peer_per_round"]["median"] == 1.5
    assert ours["tokens_per_second"] == full_task().tokens / 2


def test_the_plot_is_xml_with_a_bar_for_each() -> None:
    drawing = ElementTree.fromstring(plot.bars(entries(), "a & b"))
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawing.findall(f"{space}rect")) == 1 + 2
    assert "1.50x" in "".join(drawing.itertext())


@pytest.mark.slow
def test_quick_runs_two_rows_beside_torchs_and_writes_them(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_parallel.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench_parallel.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["plain torch", "torch ddp", "ddp", "torch pipelining 1f1b", "pp3 1f1b"]
    for row in rows.values():
        assert row["step_ms"]["p10"] <= row["step_ms"]["median"] <= row["step_ms"]["p90"]
        assert row["loss_difference"] <= results.LOSS_TOLERANCE
        assert len(row["memory_per_rank"]) == row["ranks"]
        assert row["steps"] == found["rounds"] * found["steps_per_round"]
    assert rows["pp3 1f1b"]["speed_vs_peer"] > 0
    assert found["versions"]["torch"] and found["cores"] and found["cpu"]
    ElementTree.parse(tmp_path / "bench_parallel.svg")

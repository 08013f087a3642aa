"""The benchmark of servers runs to its end: all give the same greedy answers before anything is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench_serve import PEER, main


@pytest.mark.slow
def test_quick_run_writes_every_server_at_each_number_of_clients(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench_serve.json").read_text())["results"]
    assert [entry["clients"] for entry in results] == [1, 4]
    assert all({"native", "llamacpp", PEER} <= set(entry["servers"]) for entry in results)
    assert (tmp_path / "bench_serve.svg").read_text().startswith("<svg")

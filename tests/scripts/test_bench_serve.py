"""The benchmark of servers runs to its end: all give the same greedy answers before anything is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench_serve import PEER, main
from scripts.serve_bench.task import TEXTS
from tests.serving.made_servers import save_drafting


@pytest.mark.slow
def test_quick_run_writes_every_server_at_each_number_of_clients(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench_serve.json").read_text())["results"]
    assert [entry["clients"] for entry in results] == [1, 4]
    assert all({"native", "llamacpp", PEER} <= set(entry["servers"]) for entry in results)
    assert (tmp_path / "bench_serve.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_drafts_alone_are_measured_with_what_became_of_them(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = save_drafting(tmp_path, 1)
    assert main(["--quick", "--mtp", str(model), "--out", str(tmp_path)]) == 0
    entries = json.loads((tmp_path / "bench_drafts.json").read_text())["results"]
    assert [entry["model"] for entry in entries] == list(TEXTS)
    for entry in entries:
        plain, drafting = entry["servers"]["llamacpp"], entry["servers"]["llamacpp --speculative"]
        assert plain["drafted"] == 0 < drafting["drafted"] and 0 <= drafting["accepted"] <= drafting["drafted"]
    assert not (tmp_path / "bench_serve.json").exists()

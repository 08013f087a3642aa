"""The check of a GPU runs to its end on a CPU, keeps what it found, and tells what is wrong."""

from __future__ import annotations

import json

import pytest

from scripts import gpu_check


def test_a_part_runs_in_its_own_process_and_its_facts_are_kept(tmp_path, capsys):
    assert gpu_check.main(["--device", "cpu", "--only", "experts", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["experts"]
    assert len(found["facts"]) == 6 and all(fact["ok"] and fact["apart"] <= 2e-2 for fact in found["facts"])
    assert "64 experts, 40 rows, 64 to 64, bfloat16: apart" in capsys.readouterr().out


def test_a_part_that_hangs_keeps_what_it_found_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.LIMITS, "waits", 0.05)
    assert gpu_check.main(["--device", "cpu", "--only", "waits", "--out", str(tmp_path)]) == 1
    assert "FAILED: not done after 0.05 s" in capsys.readouterr().out


def test_what_differs_is_named():
    facts = [{"case": "gqa, bf16", "ok": False}, {"case": "mla, fp32", "ok": True}, {"case": "copy"}]
    assert gpu_check.verdict({"facts": facts}) == "DIFFERS: gqa, bf16"
    assert gpu_check.verdict({"facts": facts[1:]}) == "ok"
    assert gpu_check.verdict({"facts": facts, "failed": "first\nlast"}) == "FAILED: last"


def test_an_unknown_part_is_refused(capsys):
    assert gpu_check.main(["--only", "wait"]) == 2
    assert '(did you mean "waits"?)' in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_check_runs_to_its_end_on_a_cpu(tmp_path):
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(parts) == list(gpu_check.LIMITS)

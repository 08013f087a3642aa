"""A file that a verb is asked to write never takes the place of one that it did not write."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.cli import main
from tests.cli.made_run import make_run

PLAN = ("plan", "--gpus", "2", "--pp-size", "2", "--hardware", "cpu", "--json")
VERIFY = ("verify-parallel", "--gpus", "2", "--pp-size", "2", "--json")
EVAL = ("eval", "toy", "--max-new-tokens", "4", "--limit", "1", "--output-dir", "runs")


@pytest.mark.parametrize("arguments", [PLAN, VERIFY, (*EVAL, "--json"), (*EVAL, "--html")])
@pytest.mark.parametrize("content", ["my notes", '{"mine": 1}', '["mine"]', "\udc80"])
def test_another_file_is_refused_before_any_work(
    arguments: tuple[str, ...], content: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "mine"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert main([*arguments, str(path)]) == 2
    assert f"{arguments[-1]} {path}: there is another file already" in capsys.readouterr().err
    assert path.read_bytes() == content.encode(errors="surrogateescape")


def test_what_the_verb_wrote_itself_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs", models=("sft",))
    for _ in range(2):
        assert main([*PLAN, "plan.json"]) == 0
        assert main([*EVAL, "--json", "r.json", "--html", "r.html", "--report", "jsonl=r.jsonl"]) == 0
    for option, written in (("--json", "plan.json"), ("--html", "r.jsonl"), ("--report", "jsonl=r.html")):
        capsys.readouterr()
        assert main([*EVAL, option, written]) == 2
        assert "there is another file already" in capsys.readouterr().err

"""`profile` at the command line: a run's stage on a copy, and what cannot be profiled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.dag.ledger import RunLock
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.run_folder import CONFIG_FILE
from tests.cli.made_run import make_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), models=("pretrain",))


def profile(run_dir: Path, *arguments: str) -> int:
    return main(["profile", "toy", "--gpus", "1", "--output-dir", str(run_dir.parent), *arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stage", "sfd"], 'did you mean "sft"'),
        (["--stage", "export"], "trains nothing in this run"),
        (["--stage", "grpo"], "grpo: reads what sft makes, which is not finished"),
        (["--stage", "sft", "--step", "99999"], "goes beyond sft's 400 steps"),
        (["--stage", "sft", "--out", "tests"], "which no whole manifest.json of this program there lists"),
        (["--backend", "modal"], "steps are profiled on this machine"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_a_process_starts(run_dir, capsys, arguments, said):
    assert profile(run_dir, *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_folder_with_a_profile_of_another_program_is_left_alone(run_dir, tmp_path, capsys):
    for name in ("profile.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    assert profile(run_dir, "--stage", "sft", "--out", str(tmp_path)) == 2
    assert "is not replaced" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "profile.json"]


def test_a_run_that_is_worked_on_is_left_alone(run_dir, capsys):
    with RunLock(run_dir):
        assert profile(run_dir) == 2
    assert "a process is working on this run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_is_profiled_and_the_run_stays_as_it_was(run_dir, capsys):
    def contents() -> dict[str, str]:
        files = [path for path in run_dir.rglob("*") if path.is_file() and "profiles" not in path.parts]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name != ".lock"}

    before = contents()
    assert load_config(run_dir / CONFIG_FILE).sft.steps == 900
    assert profile(run_dir, "--stage", "sft", "--step", "3", "--steps", "2") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("forward", "backward", "optimizer step", "messages between ranks", "perfetto"))
    found = json.loads((run_dir / "profiles" / "sft-step-3" / "profile.json").read_text())
    assert found["checkpoint"] == 0 and len(found["ranks"]) == 1
    assert {path.name for path in (run_dir / "profiles" / "sft-step-3").iterdir()} == {
        "profile.json", "rank-0.trace.json.gz", "manifest.json",
    }  # fmt: skip
    assert contents() == before

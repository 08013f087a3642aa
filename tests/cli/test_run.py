"""How `run` and `resume` choose settings and report, with the workflow replaced by a recorder."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.cli.group import STOPPING
from ray_pipeline.dag import workflow
from ray_pipeline.dag.request import RunRequest
from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.layout.layout import Layout
from ray_pipeline.settings.loading import config_yaml, load_config
from ray_pipeline.settings.schema import PipelineFields


class Recorder:
    """Stands for the workflow's `execute`."""

    def __init__(self) -> None:
        self.requests: list[RunRequest] = []
        self.answer: int | BaseException = 0

    @property
    def last(self) -> RunRequest:
        return self.requests[-1]

    @property
    def config(self) -> PipelineFields:
        return self.last.config

    def execute(self, request: RunRequest) -> int:
        self.requests.append(request)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(workflow, "execute", recorder.execute)
    monkeypatch.setattr("ray_pipeline.hardware.count_gpus", lambda: 0)
    return recorder


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A run started with other settings than the recipe's, on three ranks."""
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    settings = {"grpo.beta": 0.5, "layout.gpus": 3, "layout.pp_size": 3, "run_name": "mine"}
    (run_dir / "config.yaml").write_text(config_yaml(load_config(Path("tiny-full"), settings)), encoding="utf-8")
    return run_dir


def test_run_passes_layout_stages_and_name(seen: Recorder, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "--gpus", "3", "--pp-size", "3", "--from", "data_prep", "--until", "grpo", "--dry-run"]) == 0
    assert seen.last.layout == Layout(gpus=3, pp=3)
    stages = seen.last.stages
    assert (stages.only, stages.from_, stages.until, seen.last.dry_run) == (None, "data_prep", "grpo", True)
    assert str(seen.config.run_name).startswith("tiny-")
    assert "no GPU here: 3 CPU worker processes over gloo" in capsys.readouterr().out


def test_a_run_name_in_use_keeps_its_settings(seen: Recorder, stored: Path, tmp_path: Path) -> None:
    assert main(["run", "--run-name", "mine", "--output-dir", str(tmp_path), "--stage", "data_prep"]) == 0
    assert (seen.config.grpo.beta, seen.last.layout.pp) == (0.5, 3)
    assert main(["run", "--run-name", "mine", "--output-dir", str(tmp_path), "--config", "tiny"]) == 0
    assert seen.config.grpo.beta != 0.5, "a recipe that is given is taken; the workflow then compares"


def test_resume_takes_the_stored_settings_and_changes(seen: Recorder, stored: Path, tmp_path: Path) -> None:
    assert main(["resume", "mine", "--output-dir", str(tmp_path), "--set", "grpo.beta=0.25"]) == 0
    assert seen.last.run_dir == stored and seen.last.resume
    assert (seen.config.grpo.beta, seen.last.layout) == (0.25, Layout(gpus=3, pp=3))
    assert main(["resume", str(stored), "--gpus", "1"]) == 0
    assert seen.last.layout == Layout()


def test_the_exit_code_is_the_workflows(seen: Recorder) -> None:
    seen.answer = 1
    assert main(["run"]) == 1


def test_ctrl_c_says_how_to_go_on(seen: Recorder, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    seen.answer = KeyboardInterrupt()
    assert main(["run", "--run-name", "cats"]) == 130
    assert capsys.readouterr().err.strip().endswith("resume cats")
    assert main(["resume", "mine", "--output-dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().endswith(f"resume mine --output-dir {tmp_path}")


@pytest.fixture
def fresh_signals() -> Iterator[None]:
    """Signals as a new program has them: in this process other tests may have started Ray, which takes SIGTERM."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)


@pytest.mark.usefixtures("fresh_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_program_says_how_to_go_on(
    seen: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def run(_: RunRequest) -> int:
        os.kill(os.getpid(), number)
        time.sleep(30)
        raise AssertionError("the signal was not noticed")

    monkeypatch.setattr(workflow, "execute", run)
    assert main(["run", "--run-name", "cats", "--output-dir", str(tmp_path / "a b")]) == 128 + number
    assert capsys.readouterr().err.strip().endswith(f"resume cats --output-dir '{tmp_path / 'a b'}'")
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.usefixtures("fresh_signals")
def test_a_signal_in_another_verb_ends_it_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("ray_pipeline.cli.runs.list_runs", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["status"]) == 143
    assert capsys.readouterr().err.strip() == "Stopped."


def test_a_users_mistake_found_in_a_stage_has_no_traceback(seen: Recorder, capsys: pytest.CaptureFixture) -> None:
    seen.answer = UserError("data.jsonl line 3: no field text")
    assert main(["run"]) == 2
    assert capsys.readouterr().err == "Error: data.jsonl line 3: no field text\n"
    seen.answer = StageFailed("sft: worker died")
    assert main(["run"]) == 1
    assert capsys.readouterr().err == "Failed: sft: worker died\n"


def test_a_bug_keeps_its_traceback(seen: Recorder) -> None:
    seen.answer = AssertionError("ours")
    with pytest.raises(AssertionError):
        main(["run"])


def test_an_odd_student_is_a_warning(seen: Recorder, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "--set", "distillation.student.num_hidden_layers=6"]) == 0
    assert "Warning: the distillation student has" in capsys.readouterr().err


def test_three_ranks_of_a_stored_run_need_no_flag_again(seen: Recorder, stored: Path, tmp_path: Path) -> None:
    assert main(["run", "--run-name", "mine", "--output-dir", str(tmp_path), "--zero-stage", "1"]) == 0
    assert seen.last.layout == Layout(gpus=3, pp=3, zero_stage=1)


def test_what_is_not_read_of_records_is_told_on_the_terminal(
    seen: Recorder, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "url": "x"}\n{"text": "two", "url": "y"}\n')
    assert main(["run", "--data", str(path), "--output-dir", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.count(f'--data {path}: not read of its 2 records: "url" (in 2)') == 1
    assert len(seen.requests) == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.txt", None, "none.txt"),
        ("empty.txt", b"", "empty.txt"),
        ("latin.txt", b"caf\xe9 au lait", "UTF-8"),
        ("lines.jsonl", b'{"text": "good"}\n{"txet": "bad"}\n', "lines.jsonl:2"),
    ],
)
def test_bad_data_is_refused_before_anything_starts(
    name: str, content: bytes | None, expected: str, seen: Recorder, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(["run", "--data", str(path), "--output-dir", str(tmp_path / "runs")]) == 2
    text = capsys.readouterr().err
    assert expected in text and "Traceback" not in text
    assert not seen.requests and not (tmp_path / "runs").exists()

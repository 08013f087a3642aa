"""Watching a run on Modal: its end, its failures, silence, Ctrl-C; and the verbs that do so from another machine."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from modal_proto import api_pb2 as pb

from modal_gpu import watch
from modal_gpu.job import Outcome, State
from modal_gpu.run_registry import Registry
from modal_gpu.volume_sync import write_sums
from ray_pipeline.cli import main
from ray_pipeline.dag.ledger import RunFile
from ray_pipeline.errors import UserError
from ray_pipeline.settings.loading import config_yaml, load_config
from tests.modal_gpu.world import Call, World, raised, succeeded


@pytest.fixture
def launched(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A run `toy` that the call fc-1 works on, with files on the volume; nothing ends by itself."""
    world.calls["fc-1"] = Call("fc-1", "fu-1", pb.FunctionInput())
    world.function_app["fu-1"] = "ap-1"
    there = world.volume("deepseek-runs") / "toy"
    RunFile(there).save()
    (there / "report.html").write_text("<p>")
    write_sums(there)
    state = State("toy", "fc-1", "ap-1", "deepseek-runs", "3 x H100", "me@there", time.time(), place="gpu", phase="sft")
    registry = Registry()
    registry.write(state)
    registry.lock("toy", "fc-1")
    monkeypatch.setattr(watch, "ASK_EVERY", 0.3)
    return world


def state_of() -> State:
    found = Registry().read("toy")
    assert found is not None
    return found


def ends(world: World, ending: Any, after: float = 0.5) -> None:
    """Let the call end soon."""
    threading.Timer(after, lambda: world.finish(world.calls["fc-1"], *ending)).start()


def status(name: str, text: str) -> tuple[pb.GenericResult, int]:
    return pb.GenericResult(status=getattr(pb.GenericResult, f"GENERIC_STATUS_{name}"), exception=text), 0


def test_a_run_that_ends_well_is_fetched_and_checked(
    launched: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ends(launched, succeeded(Outcome(1)))
    assert watch.watch(state_of(), tmp_path / "runs/toy") == 1
    assert "Fetched 2 files (0.0 MiB, 2 of them checked)" in capsys.readouterr().out
    assert (tmp_path / "runs/toy/report.html").read_text() == "<p>"


def test_the_log_is_shown_while_it_runs(launched: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    launched.calls["fc-2"] = Call("fc-2", "fu-1", pb.FunctionInput())
    Registry().note("toy", piece="fc-2")
    launched.logs.append(("ap-1", "fc-2", "step 1/3\n"))
    launched.finish(launched.calls["fc-2"], *succeeded(Outcome(0)))
    ends(launched, succeeded(Outcome(0)), 1.5)
    assert watch.watch(state_of(), tmp_path / "runs/toy") == 0
    assert "step 1/3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ending", "code", "text"),
    [
        (succeeded(Outcome(1, "sft failed: boom.")), 1, "sft failed: boom. Fetched"),
        (succeeded(Outcome(2, "data.txt: line 3 is empty", user_error=True)), 2, "line 3 is empty. Fetched"),
        (raised(ValueError("no such thing")), 1, "its container ended: ValueError: no such thing"),
        (status("TIMEOUT", "hit its timeout"), 1, "its time on Modal was up"),
        (status("TERMINATED", "Input was cancelled"), 1, "it was stopped"),
        (status("INTERNAL_FAILURE", "worker lost"), 1, "its container ended: InternalFailure: worker lost"),
    ],
)
def test_a_run_that_ends_badly_is_one_message_with_what_to_type(
    launched: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, ending: Any,
    code: int, text: str,
) -> None:  # fmt: skip
    from ray_pipeline.cli.group import guarded

    launched.finish(launched.calls["fc-1"], *ending)
    assert guarded(lambda: watch.watch(state_of(), tmp_path / "runs/toy")) == code
    told = capsys.readouterr().err
    assert text in told and told.count("\n") == 1 and "Traceback" not in told
    assert "resume toy" in told and "modal logs toy" in told and "Fetched 2 files" in told


def test_silence_is_told_and_ends_nothing(
    launched: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SILENCE", 1.0)
    state = state_of()
    launched.delay = 3.0
    threading.Timer(2.0, lambda: setattr(launched, "delay", 0.0)).start()
    ends(launched, succeeded(Outcome(0)), 3.5)
    assert watch.watch(state, tmp_path / "runs/toy") == 0
    assert "Modal does not answer; the run goes on there" in capsys.readouterr().err


def interrupted(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """Ctrl-C once it is watched, and what is typed then; without answers nobody is there."""

    class Asked(watch._Asked):
        def __init__(self, call: str):
            super().__init__(call)
            for index in range(max(1, len(answers))):
                threading.Timer(0.5 + index, os.kill, (os.getpid(), signal.SIGINT)).start()

    left = list(answers)
    monkeypatch.setattr("sys.stdin.isatty", lambda: bool(answers), raising=False)
    monkeypatch.setattr("builtins.input", lambda _: left.pop(0))
    monkeypatch.setattr(watch, "_Asked", Asked)


@pytest.mark.parametrize("answers", [(), ("d",)])
def test_ctrl_c_leaves_it_alone(
    launched: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    answers: tuple[str, ...],
) -> None:
    interrupted(monkeypatch, *answers)
    assert watch.watch(state_of(), tmp_path / "runs/toy") == 0
    assert "Left alone: toy goes on." in capsys.readouterr().out
    assert launched.calls["fc-1"].output is None and not launched.requests(pb.FunctionCallCancelRequest)


def test_ctrl_c_can_stop_it_after_going_on_watching(
    launched: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, "w", "s")
    with pytest.raises(KeyboardInterrupt):
        watch.watch(state_of(), tmp_path / "runs/toy")
    assert all(request.terminate_containers for request in launched.requests(pb.FunctionCallCancelRequest))
    assert launched.calls["fc-1"].output is not None
    assert state_of().ended and Registry().holder("toy") is None


def test_ctrl_c_before_the_call_starts_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modal_gpu.launch.upload", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    flags = ["--gpus", "1", "--yes", "--run-name", "toy", "--output-dir", str(tmp_path / "runs")]
    assert main(["run", "--backend", "modal", *flags]) == 130
    assert "Nothing was started on Modal." in capsys.readouterr().err
    assert not world.calls


def test_ctrl_c_while_the_image_is_built_starts_nothing_and_the_same_command_goes_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--gpus", "1", "--yes", "--detach", "--run-name", "toy", "--output-dir", str(tmp_path / "runs")]
    world.building = lambda: threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert main(["run", "--backend", "modal", *flags]) == 130
    said = capsys.readouterr()
    assert "Nothing was started on Modal." in said.err and "FROM nvidia/cuda" in said.out
    assert not world.calls and Registry().holder("toy") is None
    world.building = None
    assert main(["run", "--backend", "modal", *flags]) == 0
    assert list(world.calls) == ["fc-1"]


def test_ctrl_c_while_it_is_fetched_says_how_to_go_on(
    launched: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupts(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "fetch", interrupts)
    with pytest.raises(UserError, match="not all of it was fetched. Go on with: .* modal pull toy"):
        watch.finish(Outcome(0), state_of(), tmp_path / "runs/toy")


def test_status_without_a_run_lists_them(launched: World, capsys: pytest.CaptureFixture) -> None:
    assert main(["modal", "status"]) == 0
    shown = capsys.readouterr().out
    assert "toy" in shown and "3 x H100, call fc-1" in shown and "by me@there; sft" in shown
    assert main(["modal", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["going"] is True


def test_status_of_a_run(launched: World, capsys: pytest.CaptureFixture) -> None:
    assert main(["modal", "status", "toy"]) == 0
    assert "3 x H100, call fc-1" in capsys.readouterr().out
    assert main(["modal", "status", "tou"]) == 2
    assert '(did you mean "toy"?)' in capsys.readouterr().err


def test_the_dashboard_of_a_run_on_its_volume(launched: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("textual")
    picture = tmp_path / "watch.svg"
    assert main(["watch", "modal://toy", "--screenshot", str(picture)]) == 2
    assert "modal://toy: holds no run" in capsys.readouterr().err
    there = launched.volume("deepseek-runs") / "toy"
    (there / "config.yaml").write_text(config_yaml(load_config(None, {"run_name": "toy"})))
    assert main(["watch", "modal://toy", "--screenshot", str(picture)]) == 0
    assert "modal://toy" in picture.read_text() and "data_prep" in picture.read_text()
    assert main(["watch", "modal://tou", "--screenshot", str(picture)]) == 2
    assert '(did you mean "toy"?)' in capsys.readouterr().err


def test_pull_from_another_machine_copies_once_and_checks(
    launched: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = ["--output-dir", str(tmp_path / "far")]
    assert main(["modal", "pull", "toy", *place]) == 0
    assert "Fetched 2 files" in capsys.readouterr().out
    assert main(["modal", "pull", "toy", *place]) == 0
    assert "Fetched 0 files" in capsys.readouterr().out
    (launched.volume("deepseek-runs") / "toy/report.html").write_text("<b>")
    (tmp_path / "far/toy/report.html").unlink()
    assert main(["modal", "pull", "toy", *place]) == 2
    assert "arrived with other contents than were written" in capsys.readouterr().err
    assert not (tmp_path / "far/toy/report.html").exists()


def test_stop_from_another_machine(launched: World, capsys: pytest.CaptureFixture) -> None:
    assert main(["modal", "stop", "toy", "--now"]) == 0
    assert "Stopped toy." in capsys.readouterr().out and launched.calls["fc-1"].output is not None
    assert main(["modal", "stop", "toy"]) == 0
    assert "nothing of it is running" in capsys.readouterr().out


def test_stop_lets_it_save_first(launched: World, capsys: pytest.CaptureFixture) -> None:
    def saves() -> None:
        while not Registry().stop_wanted("toy"):
            time.sleep(0.1)
        launched.finish(launched.calls["fc-1"], *succeeded(Outcome(2, "it was asked to", user_error=True)))

    threading.Thread(target=saves, daemon=True).start()
    assert main(["modal", "stop", "toy"]) == 0
    assert "Asked toy to save and end" in capsys.readouterr().out
    assert not launched.requests(pb.FunctionCallCancelRequest)


def test_logs_from_another_machine(launched: World, capsys: pytest.CaptureFixture) -> None:
    launched.logs += [("ap-1", "fc-2", "one\n"), ("ap-2", "fc-3", "of another\n"), ("ap-1", "fc-2", "two\n")]
    assert main(["modal", "logs", "toy"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    launched.calls["fc-2"] = Call("fc-2", "fu-1", pb.FunctionInput())
    Registry().note("toy", piece="fc-2")
    launched.finish(launched.calls["fc-2"], *succeeded(Outcome(0)))
    ends(launched, succeeded(Outcome(0)), 0.1)
    assert main(["modal", "logs", "toy", "--follow"]) == 0
    assert "one\ntwo\n" in capsys.readouterr().out


def test_setup_says_what_is_there(world: World, capsys: pytest.CaptureFixture) -> None:
    world.secrets["st-9"], world.secret_names["wandb"] = {"WANDB_API_KEY": "x"}, "st-9"
    assert main(["modal", "setup"]) == 0
    shown = capsys.readouterr().out
    assert "wandb with WANDB_API_KEY" in shown and "modal secret create huggingface HF_TOKEN=..." in shown


def test_oauth_counts_as_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    from modal_gpu.failures import check_credentials

    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    for name in ("REFRESH_TOKEN", "CLIENT_ID", "CLIENT_SECRET"):
        monkeypatch.setenv(f"MODAL_OAUTH_{name}", "x")
    check_credentials()

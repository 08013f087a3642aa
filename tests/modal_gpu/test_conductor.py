"""The conductor, with pieces that end as a test says: where it goes next, what it begins again, what it gives up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import modal
import pytest
from modal_proto import api_pb2 as pb

from modal_gpu import body
from modal_gpu.body import conduct
from modal_gpu.job import Job, Outcome, State
from modal_gpu.run_registry import Registry, call_lives
from tests.modal_gpu.world import Call, World, succeeded

TIMED_OUT = pb.GenericResult(
    status=pb.GenericResult.GENERIC_STATUS_TIMEOUT, exception="Task's current input hit its timeout"
)
LOST = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE, exception="container exited")
STOPPED = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_TERMINATED, exception="Input was cancelled")


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "run": "toy", "settings": "", "stored": "", "stages": {}, "volume": "v", "runs_dir": "/runs", "device": "cuda",
        "asked": 0.0, "deadline": time.time() + 100, "by": "me@here",
    }  # fmt: skip
    return Job(**values | changes)


@dataclass
class Pieces:
    """Functions whose calls end at once, one after the other as given; an entry may do something before."""

    world: World
    endings: list[Any]
    places: list[str] = field(default_factory=list)

    def functions(self) -> dict[str, Any]:
        return {name: SimpleNamespace(spawn=self._spawn) for name in ("cpu", "gpu", "conductor")}

    def _spawn(self, _: Job, place: Any) -> Any:
        call = Call(self.world.new("fc"), "fu-1", pb.FunctionInput())
        self.world.calls[call.id] = call
        self.places.append(place if isinstance(place, str) else "conductor")
        ending = self.endings.pop(0) if self.endings else None
        if isinstance(ending, Callable):  # type: ignore[arg-type]
            ending = ending()
        if isinstance(ending, Outcome):
            self.world.finish(call, *succeeded(ending))
        elif ending is not None:
            self.world.finish(call, ending)
        return SimpleNamespace(object_id=call.id)


@pytest.fixture
def called(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """This process is what runs the call fc-me."""
    world.calls["fc-me"] = Call("fc-me", "fu-1", pb.FunctionInput())
    monkeypatch.setattr("modal.current_function_call_id", lambda: "fc-me")
    monkeypatch.setattr(body, "POLL", 0.2)
    return world


def test_pieces_follow_one_another_where_the_one_before_says(called: World) -> None:
    pieces = Pieces(called, [Outcome(0, next="gpu"), Outcome(1, next="cpu"), Outcome(0)])
    assert conduct(job(), pieces.functions()) == Outcome(1), "a stage learned nothing"
    assert pieces.places == ["cpu", "gpu", "cpu"]
    state = Registry().read("toy")
    assert state is not None and state.ended and state.phase == "ended"
    assert Registry().holder("toy") is None


def test_nothing_is_rented_where_nothing_is_to_do(called: World) -> None:
    pieces = Pieces(called, [Outcome(0)])
    assert conduct(job(), pieces.functions()) == Outcome(0)
    assert pieces.places == ["cpu"]


def test_a_failed_piece_ends_the_run(called: World) -> None:
    failed = Outcome(1, "sft failed: boom")
    pieces = Pieces(called, [Outcome(0, next="gpu"), failed])
    assert conduct(job(), pieces.functions()) == failed


def test_a_piece_that_ran_a_day_is_begun_again_as_long_as_it_saves(called: World) -> None:
    def saved(name: str) -> Callable[[], Any]:
        def ending() -> Any:
            Registry().note("toy", saved=name)
            return TIMED_OUT

        return ending

    days = [saved(f"step_{day}") for day in range(5)]
    pieces = Pieces(called, [Outcome(0, next="gpu"), *days, Outcome(0)])
    assert conduct(job(), pieces.functions()) == Outcome(0)
    assert pieces.places == ["cpu", *["gpu"] * 6]


@pytest.mark.parametrize(("ending", "text"), [(TIMED_OUT, "as long as Modal lets"), (LOST, "container exited")])
def test_one_that_gets_nowhere_is_given_up(called: World, ending: Any, text: str) -> None:
    pieces = Pieces(called, [Outcome(0, next="gpu"), *[ending] * 9])
    found = conduct(job(), pieces.functions())
    assert found.exit_code == 1 and text in (found.error or "") and "3 times" in (found.error or "")
    assert pieces.places.count("gpu") == 3


def test_a_piece_that_was_stopped_is_not_begun_again(called: World) -> None:
    pieces = Pieces(called, [STOPPED])
    assert conduct(job(), pieces.functions()) == Outcome(1, "it was stopped")


def test_the_time_of_the_run_is_kept(called: World) -> None:
    pieces = Pieces(called, [None])
    found = conduct(job(deadline=time.time() + 2.5), pieces.functions())
    assert "timeout_seconds are over" in (found.error or "")
    assert [request.function_call_id for request in called.requests(pb.FunctionCallCancelRequest)] == ["fc-1"]


def test_a_conductor_that_begins_again_waits_for_the_piece_that_goes_on(called: World) -> None:
    pieces = Pieces(called, [Outcome(0)])
    pieces._spawn(job(), "gpu")
    registry = Registry()
    registry.write(State("toy", call="fc-me", piece="fc-1", place="gpu"))
    registry.lock("toy", "fc-me")
    assert conduct(job(), pieces.functions()) == Outcome(0)
    assert pieces.places == ["gpu"], "no other piece was begun"


def test_a_second_conductor_does_not_work_on_the_same_run(called: World) -> None:
    called.calls["fc-other"] = Call("fc-other", "fu-1", pb.FunctionInput())
    assert Registry().lock("toy", "fc-other") is None
    pieces = Pieces(called, [])
    found = conduct(job(), pieces.functions())
    assert found.user_error and "fc-other works on it already" in (found.error or "") and pieces.places == []
    called.finish(called.calls["fc-other"], LOST)
    pieces.endings = [Outcome(0)]
    assert conduct(job(), pieces.functions()) == Outcome(0), "the lock of a call that is over is taken"


def test_an_error_of_the_conductor_s_own_leaves_its_piece_to_the_next_try(called: World) -> None:
    pieces = Pieces(called, [None])
    with pytest.raises(RuntimeError):
        conduct(job(), pieces.functions() | {"cpu": SimpleNamespace(spawn=_breaks(pieces))})
    state = Registry().read("toy")
    assert state is not None and not state.ended
    assert Registry().lock("toy", "fc-me") is None, "the same call has it still"


def _breaks(pieces: Pieces) -> Callable[..., Any]:
    def spawn(*_: Any) -> Any:
        raise RuntimeError("the service was away")

    return spawn


def test_a_piece_that_nobody_waits_for_is_ended_by_the_next_one(called: World) -> None:
    for name in ("fc-old", "fc-new"):
        called.calls[name] = Call(name, "fu-1", pb.FunctionInput())
    registry = Registry()
    registry.take_over("toy/piece", "fc-old")
    registry.take_over("toy/piece", "fc-old")
    assert called.calls["fc-old"].output is None, "the same call, in another container"
    registry.take_over("toy/piece", "fc-new")
    assert called.calls["fc-old"].output is not None and called.calls["fc-new"].output is None
    assert registry.runs() == []


def test_after_most_of_a_day_another_conductor_goes_on(called: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "HAND_OVER", 0.1)
    pieces = Pieces(called, [None, None])
    found = conduct(job(), pieces.functions())
    assert pieces.places == ["cpu", "conductor"] and found.moved == "fc-2"
    state = Registry().read("toy")
    assert state is not None and state.call == "fc-2" and state.piece == "fc-1" and not state.ended
    assert Registry().holder("toy") == "fc-2"
    monkeypatch.setattr("modal.current_function_call_id", lambda: "fc-2")
    called.finish(called.calls["fc-1"], *succeeded(Outcome(0)))
    assert conduct(job(), pieces.functions()) == Outcome(0)
    assert pieces.places == ["cpu", "conductor"], "it waited for the piece that went on"


def test_a_service_that_does_not_answer_frees_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a call that is known to be over is; who does not know lets the holder have the run."""

    class Call:
        def get(self, timeout: float) -> None:
            raise error

    monkeypatch.setattr(modal.FunctionCall, "from_id", lambda _: Call())
    for error in (modal.exception.ConnectionError("away"), modal.exception.ServiceError("busy")):
        with pytest.raises(type(error)):
            call_lives("fc-1")
    error = modal.exception.OutputExpiredError("gone")
    assert not call_lives("fc-1")

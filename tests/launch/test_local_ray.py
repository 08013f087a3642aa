"""Ray that is slow to start is tried again; every other error is told as it is."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray

from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.launch.local_ray import TRIES, asks_for_token, start_local_ray, start_ray


def failing(monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> list[dict]:
    """`ray.init` that raises these one after another, then succeeds; what it was called with."""
    calls: list[dict] = []

    def init(**options: object) -> None:
        calls.append(options)
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(ray, "init", init)
    return calls


def late() -> Exception:
    return Exception("The current node timed out during startup. This could happen because some of the raylet failed")


def test_a_slow_start_is_tried_again_with_the_same_options(monkeypatch):
    calls = failing(monkeypatch, [late() for _ in range(TRIES - 1)])
    start_ray(num_cpus=2)
    assert len(calls) == TRIES
    assert all(call == calls[0] and call["num_cpus"] == 2 for call in calls)


def test_what_a_slow_start_left_running_is_ended_before_the_next_try(monkeypatch):
    """Half of Ray's processes would keep the machine busy that was too busy; others of this process live on."""
    mine = subprocess.Popen(["sleep", "600"])
    left: list[subprocess.Popen[bytes]] = []

    def init(**options: object) -> None:
        assert all(one.poll() is not None for one in left)
        left.append(subprocess.Popen(["sleep", "600"]))
        if len(left) < TRIES:
            raise late()

    monkeypatch.setattr(ray, "init", init)
    try:
        start_ray()
        assert [one.poll() is None for one in left] == [False] * (TRIES - 1) + [True] and mine.poll() is None
    finally:
        for one in (mine, *left):
            one.kill()
            one.wait()


def test_one_that_never_comes_up_is_told_in_a_line(monkeypatch):
    failing(monkeypatch, [late() for _ in range(TRIES)])
    with pytest.raises(StageFailed, match="too busy or short of memory"):
        start_ray()


def test_other_errors_are_not_tried_again(monkeypatch):
    calls = failing(monkeypatch, [ConnectionError("nobody there")])
    with pytest.raises(ConnectionError, match="nobody there"):
        start_ray()
    assert len(calls) == 1


def test_a_local_ray_is_one_of_its_own_whatever_runs_beside_it(monkeypatch):
    calls = failing(monkeypatch, [])
    start_local_ray()
    assert [call["address"] for call in calls] == ["local"]


@pytest.mark.parametrize("home", ["/dev/null", "/proc/1", "/nowhere/at/all"])
def test_without_a_home_to_write_to_ray_is_given_its_password(monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os, "environ", {name: os.environ[name] for name in os.environ if name != "RAY_AUTH_TOKEN"})
    failing(monkeypatch, [])
    start_local_ray()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_place_that_ray_cannot_write_to_is_named(monkeypatch):
    failing(monkeypatch, [PermissionError(13, "Permission denied", "/closed/ray")])
    with pytest.raises(UserError, match=r"Ray cannot write its files /closed/ray: Permission denied\. Set RAY_TMPDIR"):
        start_local_ray()


def test_a_cluster_is_shown_no_password_that_it_does_not_ask_for():
    """By gRPC's own server, which refuses who shows none as Ray's does, or answers; and where nothing listens."""

    class Guard(grpc.ServerInterceptor):
        def intercept_service(self, continuation, details):  # type: ignore[no-untyped-def]
            code = grpc.StatusCode.UNAUTHENTICATED if guarded else grpc.StatusCode.UNIMPLEMENTED
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(code, "no"))

    server = grpc.server(ThreadPoolExecutor(1), interceptors=[Guard()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        for guarded in (True, False):
            assert asks_for_token("127.0.0.1", port, 10.0) == guarded
    finally:
        server.stop(None).wait()
    assert not asks_for_token("127.0.0.1", port, 10.0)

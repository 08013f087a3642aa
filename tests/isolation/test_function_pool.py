"""A function that raises, hangs or dies costs its own call and no other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_pipeline.errors import UserError
from ray_pipeline.isolation.function_pool import Call, FunctionPool, Outcome

MADE = "tests.isolation.made:"
NAMES = (
    "double", "hangs", "hangs_deaf", "raises", "exits", "crashes", "allocates", "forks", "leaves", "prints", "draws",
    "process", "strange",
)  # fmt: skip


def call(name, *arguments):
    return Call(MADE + name, arguments)


def pool(processes=2, timeout_seconds=1.0, names=NAMES):
    return FunctionPool([MADE + name for name in names], timeout_seconds=timeout_seconds, processes=processes)


@pytest.fixture(scope="module")
def shared():
    with pool() as made:
        yield made


BAD = {
    call("raises", "no luck"): "ValueError: no luck (made.py, line ",
    call("hangs", 60): "took longer than 1 seconds",
    call("exits", 3): "its process died (exit code 3)",
    call("crashes", 11): "its process died (SIGSEGV)",
    call("allocates", 10): "MemoryError: its process may take 8 GiB, unless prepare_process()",
    call("leaves"): "its process died (exit code 1)",
    call("strange"): "TypeError: Object of type object is not JSON serializable",
    call("double"): "TypeError: double() missing 1 required positional argument",
}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_bad_calls_are_told_and_the_others_are_answered_whatever_the_number_of_processes(processes):
    calls = [mixed for i, bad in enumerate(BAD) for mixed in (call("double", i), bad)]
    with pool(processes) as made:
        outcomes = made.run(calls)
        again = made.run([call("double", i) for i in range(20)])
    assert [o.value for o in outcomes[::2]] == [2 * i for i in range(len(BAD))]
    for outcome, said in zip(outcomes[1::2], BAD.values(), strict=True):
        assert outcome.value is None and outcome.error is not None and outcome.error.startswith(said), outcome
    assert again == [Outcome(2 * i) for i in range(20)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([("double", 3), ("raises", "x"), ("draws",)]) | st.integers(0, 9), max_size=8))
def test_outcomes_keep_the_order_of_the_calls(shared, asked):
    calls = [call("double", a) if isinstance(a, int) else call(*a) for a in asked]
    outcomes = shared.run(calls)
    assert len(outcomes) == len(calls)
    for a, outcome in zip(asked, outcomes, strict=True):
        if isinstance(a, int):
            assert outcome == Outcome(2 * a)
        elif a[0] == "raises":
            assert outcome.error is not None


def test_what_overran_is_dead_with_the_processes_it_started(tmp_path, monkeypatch):
    monkeypatch.setenv("MADE_PIDS", str(tmp_path / "pids"))
    with pool(1) as made:
        (outcome,) = made.run([call("hangs_deaf", 300)])
    assert outcome.error == "took longer than 1 seconds"
    for pid in (tmp_path / "pids").read_text().split():
        _dies(int(pid), 5)


def _dies(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} is alive")


def test_draws_depend_on_the_arguments_alone():
    drawn = []
    for processes in (1, 2):
        with pool(processes, names=["draws", "double"]) as made:
            drawn.append([o.value for o in made.run([call("draws"), call("double", 1), call("draws")])])
    assert drawn[0] == drawn[1] and drawn[0][0] == drawn[0][2]


def test_processes_are_kept_and_those_that_died_between_are_replaced(shared):
    # One process may answer all calls of a run where the other one is slow to start.
    first = {o.value for _ in range(3) for o in shared.run([call("process")] * 8)}
    assert len(first) <= shared.processes and os.getpid() not in first
    for pid in first:
        os.kill(pid, 9)
    time.sleep(0.2)
    later = shared.run([call("process")] * 4)
    assert all(o.error is None for o in later) and not {o.value for o in later} & first


def test_a_function_that_forks_answers_once(shared):
    outcomes = shared.run([call("forks"), call("double", 1), call("forks"), call("double", 2)])
    assert [outcome.value for outcome in outcomes] == ["parent", 2, "parent", 4]


def test_what_a_function_prints_does_not_disturb(capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with pool(1) as made:
        assert made.run([call("prints", "to the log"), call("double", 2)]) == [Outcome("input"), Outcome(4)]
    assert "to the log" in capfd.readouterr().err


def test_a_function_that_limits_itself_is_given_its_time():
    with pool(1, 10.0, ["limited"]) as made:
        assert made.run([call("limited")]) == [Outcome(8.0)]


def test_a_module_is_prepared_before_its_functions_are_called():
    with pool(1, names=["prepared"]) as made:
        assert made.run([call("prepared")]) == [Outcome(1)]
    assert "tests.isolation.made" not in sys.modules or not sys.modules["tests.isolation.made"].PREPARED


def test_functions_that_cannot_be_imported_are_refused():
    unready = FunctionPool(["tests.isolation.unready:f"], timeout_seconds=1, processes=1)
    with (
        unready as made,
        pytest.raises(UserError, match=r"prepare_process\(\) of its module failed \(OSError: no disk"),
    ):
        made.run([Call("tests.isolation.unready:f", ())])
    with pool(1, names=["missing"]) as made, pytest.raises(UserError, match='has no function "missing"'):
        made.run([call("missing")])
    broken = FunctionPool(["tests.isolation.broken:f"], timeout_seconds=1, processes=1)
    with (
        broken as made,
        pytest.raises(UserError, match=r"importing tests.isolation.broken failed \(RuntimeError: half"),
    ):
        made.run([Call("tests.isolation.broken:f", ())])


def test_no_process_is_left_behind_when_the_parent_is_killed():
    script = (
        "from tests.isolation.test_function_pool import call, pool\nimport time\n"
        "made = pool(1, 100.0)\nprint(made.run([call('process')])[0].value, flush=True)\ntime.sleep(100)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _dies(pid, 10)


def test_a_hanging_function_ends_although_its_parent_was_killed(tmp_path):
    log = tmp_path / "pids"
    script = (
        "from tests.isolation.test_function_pool import call, pool\n"
        "pool(1, 1.0, ['hangs_deaf']).run([call('hangs_deaf', 300)])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], env=os.environ | {"MADE_PIDS": str(log)}
    )
    while not log.exists() or not log.read_text().endswith("\n"):
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    pid, child = map(int, log.read_text().split())
    _dies(pid, 15)
    os.kill(child, 9)  # what a user's function starts by itself is its own to end


def test_no_calls_start_no_process():
    with pool() as made:
        assert made.run([]) == [] and not made._workers

"""How a run was called is kept, the first call and the last ones."""

from __future__ import annotations

import sys

from ray_pipeline.dag import invocations
from ray_pipeline.dag.invocations import MOST, note_invocation, read_invocations
from ray_pipeline.settings.run_folder import INVOCATIONS_FILE


def test_what_was_typed_is_kept_as_a_shell_takes_it(tmp_path, monkeypatch):
    assert read_invocations(tmp_path) == []
    monkeypatch.setattr(sys, "argv", ["/somewhere/ray-pipeline", "run", "--data", "my text.txt"])
    note_invocation(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest", "tests"])
    note_invocation(tmp_path)
    first, second = read_invocations(tmp_path)
    assert first["command"] == "ray-pipeline run --data 'my text.txt'" and second["command"] is None
    assert first["versions"]["torch"] and first["cpus"] > 0
    (tmp_path / INVOCATIONS_FILE).write_text("{")
    assert read_invocations(tmp_path) == [], "nothing depends on it"


def test_of_many_calls_the_first_and_the_last_are_kept(tmp_path, monkeypatch):
    numbers = iter(range(MOST + 5))
    monkeypatch.setattr(invocations, "_this_one", lambda: {"time": next(numbers)})
    for _ in range(MOST + 5):
        note_invocation(tmp_path)
    assert [one["time"] for one in read_invocations(tmp_path)] == [0, *range(6, MOST + 5)]

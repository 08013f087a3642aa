"""The local copy of a dataset by name. The network is replaced, the rest is real."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ray_pipeline.errors import UserError

PATH = Path(__file__).parents[2] / "scripts" / "download_tinystories.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("download_tinystories", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_copy_can_be_given_to_data(script, monkeypatch, tmp_path, capsys):
    records = [("row", {"text": f"story {i} é"}) for i in range(5)]
    monkeypatch.setattr("ray_pipeline.data.files.hub.stream_records", lambda name, split: iter(records))
    output = tmp_path / "new" / "stories.jsonl"
    assert script.main(["--output", str(output), "--max-documents", "3"]) == 0
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == [
        "story 0 é",
        "story 1 é",
        "story 2 é",
    ]
    assert f"--data {output}" in capsys.readouterr().out


def test_a_file_that_is_there_is_not_replaced(script, tmp_path, capsys):
    output = tmp_path / "mine.jsonl"
    output.write_text("mine")
    assert script.main(["--output", str(output)]) == 2
    assert "mine.jsonl: is there already" in capsys.readouterr().err and output.read_text() == "mine"


def test_a_broken_download_leaves_nothing_and_says_why(script, monkeypatch, tmp_path, capsys):
    def broken(name, split):
        yield "row", {"text": "a"}
        raise UserError("the hub cannot be reached")

    monkeypatch.setattr("ray_pipeline.data.files.hub.stream_records", broken)
    assert script.main(["--output", str(tmp_path / "a.jsonl")]) == 2
    assert list(tmp_path.iterdir()) == []
    assert "the hub cannot be reached" in capsys.readouterr().err

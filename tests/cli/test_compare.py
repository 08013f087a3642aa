"""`compare` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.settings.layers import with_checksum
from ray_pipeline.settings.loading import config_yaml, load_config
from tests.report.test_comparison import make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, beta in (("first", "0.01"), ("second", "0.02")):
        make(folder / name, {0, 1}, range(12))
        config = load_config(None, {"grpo.beta": beta})
        (folder / name / "config.yaml").write_text(with_checksum(config_yaml(config)))
    return folder


def test_two_runs_are_shown_and_written(runs, tmp_path, capsys):
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    arguments = ["compare", "first", "second", "--output-dir", str(runs), "--html", str(page), "--json", str(data)]
    assert main(arguments) == 0
    assert "grpo.beta" in capsys.readouterr().out
    assert json.loads(data.read_text())["settings"] == {"grpo.beta": ["0.01", "0.02"]}
    assert "no difference shown" in page.read_text()
    assert main(arguments) == 0, "its own files are replaced"
    page.write_text("mine")
    assert main(arguments) == 2 and page.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["first"], "give two runs or more"),
        (["first", "first"], "first is given twice"),
        (["first", "frist"], 'did you mean "first"'),
        (["first", "second"] * 5, "10 runs are more than fit"),
        (["first", "second", "--html", "/nowhere/page.html"], "lies in none"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(runs, capsys, arguments, said):
    assert main(["compare", *arguments, "--output-dir", str(runs)]) == 2
    assert said in capsys.readouterr().err

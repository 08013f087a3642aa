"""The benchmark of single components: its forms compute the same, what does not is not timed, and it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts import bench_components
from scripts.component_bench import losses
from scripts.component_bench.child import COMPONENTS
from scripts.component_bench.form import check


@pytest.mark.parametrize("name", COMPONENTS)
def test_ours_the_formula_and_the_library_have_the_same_values_and_gradients(name: str) -> None:
    component = COMPONENTS[name]()
    assert {"ours", "plain"} < component.forms.keys() and len(component.forms) == 3
    found = check(name, component)
    assert all(len(differences) >= 3 for differences in found.values())  # output, x, a weight


def test_a_form_that_computes_something_else_is_not_timed() -> None:
    component = losses.dpo()
    plain = component.forms["plain"]
    component.forms["plain"] = replace(plain, function=lambda x: 1.001 * plain.function(x))
    with pytest.raises(
        AssertionError, match=r"DPO loss: plain differs from ours by 1.0e-03 in output; nothing is timed"
    ):
        check("DPO loss", component)


def test_an_unknown_component_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_components.main(["--only", "MLAA"]) == 2
    assert "--only MLAA: must be of MQA, GQA, MLA" in capsys.readouterr().err


def test_a_quick_run_writes_a_table_a_plot_and_where_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_components.main(["--quick", "--only", "MQA", "--out", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and rows[2].startswith("MQA            plain") and "x (" in rows[2]
    data = json.loads((tmp_path / "bench_components.json").read_text())
    (entry,) = data["components"]
    assert entry["cpu_milliseconds"].keys() == {"ours", "plain", "transformers Llama, sdpa"}
    assert data["versions"]["torch"] and data["threads"] == 1
    ElementTree.fromstring((tmp_path / "bench_components.svg").read_text())

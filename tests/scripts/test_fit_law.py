"""scripts/fit_law.py on a little text: it trains what it says, leaves a law that `--law` reads, and goes on."""

from __future__ import annotations

import json

import pytest

from ray_pipeline.costs.scaling_law import params_of, read_law, settings_of
from ray_pipeline.settings.loading import load_config
from scripts import fit_law


@pytest.mark.slow
def test_a_quick_fit_leaves_a_law_and_a_second_one_trains_nothing(tmp_path, capsys, monkeypatch):
    asked = ["mine", "--quick", "--out", str(tmp_path / "law"), "--work", str(tmp_path / "runs")]
    assert fit_law.main(asked) == 0
    law = read_law(str(tmp_path / "law" / "mine.yaml"))
    assert law.widths == (32, 48, 64) and law.text == "builtin" and len(law.validation) == 64
    found = json.loads((tmp_path / "law" / "fit_law_mine.json").read_text())
    assert [(one["width"], one["steps"]) for one in found["trainings"]] == [
        (width, steps) for width in (32, 48, 64) for steps in (3, 6)
    ] + [(96, 6)]
    for one in found["trainings"]:
        model = load_config(None, settings_of(one["width"], one["steps"])).model
        assert one["params"] == params_of(model) and one["tokens"] == one["steps"] * law.tokens_per_step
    judged = found["judged"]
    expected = law.curve.loss(found["trainings"][-1]["params"], found["trainings"][-1]["tokens"])
    assert judged["predicted"] == pytest.approx(expected, rel=1e-9)
    assert judged["off"] == judged["reached"] / judged["predicted"] - 1

    def trains(*_: object) -> None:
        raise AssertionError("all of it was trained before")

    monkeypatch.setattr(fit_law, "train", trains)
    assert fit_law.main(asked) == 0 and "reached" in capsys.readouterr().out

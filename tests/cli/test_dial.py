"""`run --compute` and `--minutes`: what is said and chosen, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.cli import dial, main
from ray_pipeline.costs.scaling_law import Curve, ScalingLaw, choose, law_text, settings_of
from ray_pipeline.dag.identity import identities
from ray_pipeline.settings.loading import load_config
from tests.cli.test_run import Recorder, seen  # noqa: F401  (a fixture)

LAW = ScalingLaw("some/text.txt", "ab" * 32, 512, 256, 8, (48, 64, 96, 128), Curve(1.2, 80.0, 0.4, 300.0, 0.4), 0.011)


@pytest.fixture
def law(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(law_text(LAW), encoding="utf-8")
    return str(path)


def test_compute_decides_size_steps_and_rates_and_says_so(seen: Recorder, law, tmp_path, capsys):  # noqa: F811
    assert main(["run", "--compute", "1e13", "--law", law, "--output-dir", str(tmp_path)]) == 0
    choice = choose(LAW, 1e13)
    expected = load_config(None, settings_of(choice.width, choice.steps))
    assert seen.config.model == expected.model and seen.config.pretrain.optimizer == expected.pretrain.optimizer
    assert seen.config.pretrain.steps == choice.steps and seen.config.sft == expected.sft
    read_once = choice.steps * 2048 // 169
    assert seen.config.data.builtin_documents == max(8000, read_once // 2)
    prediction = seen.config.pretrain.prediction
    assert prediction is not None and prediction.model_dump() == {
        "loss": choice.loss, "text": "some/text.txt", "validation": "ab" * 32
    }  # fmt: skip
    said = capsys.readouterr().out
    assert f"{choice.width} features" in said and f"{choice.steps} steps of 8 x 256 tokens" in said
    assert f"Predicted validation loss: {choice.loss:.3f} nats on some/text.txt" in said and "within 1.1%" in said


def test_a_prediction_is_no_part_of_an_identity():
    plain = load_config(None)
    prediction = {"loss": 2.0, "text": "a", "validation": "b"}
    assert identities(load_config(None, {"pretrain.prediction": prediction})) == identities(plain)


def test_set_outranks_what_the_dial_chose(seen: Recorder, law, tmp_path):  # noqa: F811
    asked = ["--compute", "1e13", "--law", law, "--set", "pretrain.steps=7", "--output-dir", str(tmp_path)]
    assert main(["run", *asked]) == 0
    assert seen.config.pretrain.steps == 7 and seen.config.model.hidden_size == choose(LAW, 1e13).width


def test_minutes_are_compute_by_the_measured_speed(seen: Recorder, law, tmp_path, monkeypatch):  # noqa: F811
    measured = []

    def speed(law: ScalingLaw, width: int) -> float:
        measured.append(width)
        return 2e10 if width < 100 else 3e10

    monkeypatch.setattr(dial, "_speed", speed)
    assert main(["run", "--minutes", "10", "--law", law, "--output-dir", str(tmp_path)]) == 0
    first = choose(LAW, 600 * (2e10 if measured[0] < 100 else 3e10)).width
    assert measured == [96, first]
    flops = 600 * (2e10 if first < 100 else 3e10)
    assert seen.config.model.hidden_size == choose(LAW, flops).width
    assert seen.config.pretrain.steps == choose(LAW, flops).steps


def test_the_speed_is_that_of_a_training_step():
    assert 1e8 < dial._speed(LAW, 48) < 1e13


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--compute", "1e13", "--minutes", "3"], "give one of them"),
        (["--compute", "1e13", "--config", "small"], "--compute with --config small: the laws are of the tiny"),
        (["--minutes", "3", "--model-size", "small"], "--minutes with --model-size small: both decide the same"),
        (["--compute", "1e13", "--max-steps", "3"], "--compute with --max-steps 3: both decide the same"),
        (["--compute", "1e6"], "--compute 1e+06: 50 steps of the smallest model of the law"),
        (["--compute", "1e22"], "--compute 1e+22: best spent on a model of 256 features or more"),
        (["--compute", "1e13", "--law", "no-such"], "--law no-such: no such law or file"),
        (["--law", "tinyshakespeare"], "--law tinyshakespeare: read with --compute or --minutes alone"),
        (["--compute", "nan"], "--compute nan: must be a finite number"),
    ],
)
def test_what_decides_the_same_twice_or_is_out_of_reach_is_refused(seen: Recorder, law, options, reason, capsys):  # noqa: F811
    given = options if "--law" in options else [*options, "--law", law]
    assert main(["run", *given]) == 2
    assert reason in capsys.readouterr().err and not seen.requests


def test_minutes_on_gpus_are_refused(seen: Recorder, law, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("ray_pipeline.hardware.count_gpus", lambda: 2)
    assert main(["run", "--minutes", "10", "--law", law]) == 2
    assert "Give --compute" in capsys.readouterr().err and not seen.requests

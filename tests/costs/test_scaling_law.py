"""The law of scaling: fitting finds the curve that made the losses; a budget goes to the best model of the law."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.config import ModelConfig
from ray_pipeline.costs.scaling_law import (
    FEWEST_STEPS,
    LAW_DIR,
    Choice,
    Curve,
    ScalingLaw,
    choose,
    fit,
    law_text,
    model_of,
    params_of,
    read_law,
    settings_of,
)
from ray_pipeline.errors import UserError
from ray_pipeline.settings.loading import load_config

CURVE = Curve(floor=1.2, size=80.0, size_exponent=0.4, data=300.0, data_exponent=0.4)
LAW = ScalingLaw("some text", "0" * 64, 512, 256, 8, (48, 64, 96, 128), CURVE, 0.01)


def flops_of(width: int, steps: int) -> float:
    return float(model_of(width, vocab_size=512, seq_len=256).flops_per_token(256) * steps * 2048)


def test_fitting_finds_the_curve_that_made_the_losses():
    sizes, tokens = (1e5, 2e5, 4e5, 8e5), (4e5, 8e5, 1.6e6)
    found, error = fit([(n, d, CURVE.loss(n, d)) for n in sizes for d in tokens])
    assert error < 2e-3
    for n, d in ((1.6e6, 1.6e6), (1.6e6, 3.2e6)):  # beyond what it was fitted on
        assert found.loss(n, d) == pytest.approx(CURVE.loss(n, d), rel=5e-3)


def test_five_numbers_need_five_trainings():
    with pytest.raises(ValueError, match="4 trainings"):
        fit([(n, 1e6, 2.0) for n in (1e5, 2e5, 3e5, 4e5)])


@pytest.mark.parametrize("flops", [3e12, 1e13, 1e14])
def test_a_budget_is_spent_and_no_other_width_promises_less(flops):
    choice = choose(LAW, flops)
    assert choice.flops == pytest.approx(flops, rel=0.02)
    assert choice.flops == flops_of(choice.width, choice.steps)
    for width in range(48, 257, 16):
        steps = round(flops / flops_of(width, 1))
        if steps >= FEWEST_STEPS:
            params = params_of(model_of(width, vocab_size=512, seq_len=256))
            assert choice.loss <= LAW.curve.loss(params, steps * 2048)


def test_more_compute_goes_to_more_of_both():
    small, large = choose(LAW, 1e13), choose(LAW, 1e15)
    assert large.width > small.width and large.steps > small.steps and large.loss < small.loss


def test_budgets_outside_of_the_law_are_refused():
    with pytest.raises(UserError, match="50 steps of the smallest model of the law, 48 wide, take 1.*e"):
        choose(LAW, flops_of(48, 10))
    with pytest.raises(UserError, match="the law was fitted on 48 to 128"):
        choose(LAW, 1e19)


def test_the_reference_width_is_the_tiny_recipe():
    tiny = load_config(None)
    chosen = load_config(None, settings_of(128, tiny.pretrain.steps))
    assert chosen == tiny.model_copy(update={"recipe": chosen.recipe})


@pytest.mark.parametrize("width", [48, 64, 96, 192])
def test_every_width_is_a_model_with_rates_in_proportion(width):
    config = load_config(None, settings_of(width, 100))
    config.model.validate()
    built = model_of(width, vocab_size=512, seq_len=256)
    starts = {key: getattr(config.model, key) for key in ("initialisation", "zero_init_outputs", "embedding_init",
                                                          "head_init")}  # fmt: skip
    assert config.model == replace(built, **starts) and isinstance(built, ModelConfig)
    student = config.distillation.student.applied_to(config.model)
    assert student.num_params() <= config.model.num_params() / 2
    reference, scaled = load_config(None).pretrain.optimizer, config.pretrain.optimizer
    ratio = width / 128
    assert scaled.lr / reference.lr == pytest.approx(ratio**-0.5, rel=1e-3)
    embedding, before = scaled.lr * scaled.embedding_lr_factor, reference.lr * reference.embedding_lr_factor
    assert embedding == pytest.approx(before, rel=1e-3)
    head, before = scaled.lr * scaled.head_lr_factor, reference.lr * reference.head_lr_factor
    assert head / before == pytest.approx(1 / ratio, rel=1e-3)
    assert scaled.lr * scaled.vector_lr_factor == pytest.approx(reference.lr * reference.vector_lr_factor, rel=1e-3)


def test_a_law_is_read_as_it_was_written(tmp_path):
    (tmp_path / "mine.yaml").write_text(law_text(LAW))
    assert read_law(str(tmp_path / "mine.yaml")) == LAW


def test_what_is_no_law_is_refused(tmp_path):
    with pytest.raises(UserError, match="--law gsm8: no such law or file"):
        read_law("gsm8")
    (tmp_path / "bad.yaml").write_text("curve: {floor: 1}\nwidths: [1]\n")
    with pytest.raises(UserError, match="not a law as scripts/fit_law.py writes it"):
        read_law(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("path", sorted(LAW_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_laws_choose(path):
    law = read_law(path.stem)
    assert len(law.widths) >= 4 and law.error < 0.03
    assert isinstance(choose(law, 1e13), Choice)

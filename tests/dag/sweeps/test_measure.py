"""What settings are compared by: each stage's own figure, or the one that is named."""

from __future__ import annotations

import pytest

from ray_pipeline.dag.ledger import Record
from ray_pipeline.dag.sweeps.measure import figure_of, last_stage, measure
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import PipelineFields

ALL = ("pretrain", "sft", "grpo", "distillation")


def test_a_stages_own_figure():
    assert measure(None, ("pretrain",)).text == "pretrain.validation_loss:min"
    assert measure(None, ("pretrain",)).title == "held-out loss in nats"
    assert measure(None, ALL).text == "distillation.accuracy:max"
    assert measure(None, ("pretrain", "sft", "dpo")).text == "dpo.preference_accuracy:max"


def test_a_named_figure():
    assert measure("pretrain.validation_loss", ALL) == measure(None, ("pretrain",))
    assert measure("largest_load:min", ("pretrain",)).text == "pretrain.largest_load:min"
    assert measure("validation_loss", ("pretrain", "sft")).text == "sft.validation_loss:min"
    assert measure("validation_loss/builtin", ("pretrain",)).mode == "min"
    assert measure("sft.accuracy:min", ALL).mode == "min"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("grpo.accuracy", "training stages pretrain, sft alone"),
        ("steps", "is less or more of it better"),
        ("accuracy:more", r"\[STAGE.\]NAME"),
        ("sft.", r"\[STAGE.\]NAME"),
    ],
)
def test_what_is_no_metric_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        measure(given, ("pretrain", "sft"))


def test_a_figure_that_the_stage_has_not_is_refused_with_those_that_it_has():
    record = Record("pretrain", "0", "done", metrics={"validation_loss": 2.5})
    assert figure_of(measure("validation_loss", ("pretrain",)), record) == 2.5
    with pytest.raises(UserError, match=r'did you mean "validation_loss".* It has validation_loss'):
        figure_of(measure("validation_los:min", ("pretrain",)), record)


def test_the_last_stage_is_the_last_that_trains():
    config = PipelineFields()
    assert last_stage(config, None) == "distillation" and last_stage(config, "sft") == "sft"
    for until, message in (("pretain", 'did you mean "pretrain"'), ("export", "nothing is learned"), ("dpo", "one of")):
        with pytest.raises(UserError, match=message):
            last_stage(config, until)

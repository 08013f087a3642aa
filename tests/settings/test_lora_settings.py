"""What of `sft.lora` cannot work is told before anything starts."""

from __future__ import annotations

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.settings.loading import load_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sft.lora.target_modules": '["q_a_porj"]'}, 'q_a_porj: no linear layer has this name (did you mean "q_a'),
        ({"sft.lora.target_modules": '["k_proj"]'}, "k_proj: not in this model"),
        ({"sft.lora.dropout": "1.0"}, "sft.lora.dropout=1.0: nothing would be left to train on"),
        (
            {"sft.lora.dropout": "0.1", "layout.activation_checkpointing": "full"},
            "sft.lora.dropout=0.1: with layout.activation_checkpointing=full activations are computed again",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(settings, message):
    with pytest.raises(UserError) as refused:
        load_config(None, {"sft.lora.r": "4", **settings})
    assert message in str(refused.value)


def test_targets_of_the_model_are_taken():
    lora = load_config(None, {"sft.lora.r": "4", "sft.lora.target_modules": '["o_proj", "eh_proj"]'}).sft.lora
    assert (lora.r, lora.target_modules) == (4, ["o_proj", "eh_proj"])

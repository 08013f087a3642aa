"""Initial weights: their deviations under each setting, and the same ones in every part of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.convert.hf_config import to_hf
from model.init import OUTPUTS, init_weights, initial_weight
from model.transformer import Transformer

SCALED = ModelConfig(initialisation="fan_in", embedding_init=0.8, head_init=0.001, zero_init_outputs=True)


def drawn(config: ModelConfig) -> dict[str, torch.Tensor]:
    model = Transformer(config)
    init_weights(model, config, 0)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.dim() > 1}


def test_matrices_start_with_one_over_the_square_root_of_what_they_read():
    for name, matrix in drawn(SCALED).items():
        if name.removesuffix(".weight").endswith(OUTPUTS):
            assert not matrix.any(), name
            continue
        expected = {"embed_tokens.weight": 0.8, "lm_head.weight": 0.001}.get(name, matrix.shape[-1] ** -0.5)
        if name.endswith("mlp.gate.weight"):
            expected = SCALED.initializer_range
        assert matrix.std() == pytest.approx(expected, rel=0.1), name


def test_a_block_whose_outputs_start_at_zero_passes_its_input_on():
    model = Transformer(SCALED)
    init_weights(model, SCALED, 0)
    x = torch.randn(2, 5, SCALED.hidden_size)
    rotation, mask = model.context(None, 5)
    assert torch.equal(model.run_layers(x, rotation, mask), x)


def test_the_default_draws_what_it_always_drew():
    config = ModelConfig()
    name, shape = "layers.1.mlp.experts.gate_up_proj", torch.Size((2, 8, 16))
    expected = initial_weight(name, shape, replace(config, initializer_range=1.0), 3) * config.initializer_range
    assert torch.equal(initial_weight(name, shape, config, 3), expected)
    fan_in = initial_weight(name, shape, replace(config, initialisation="fan_in"), 3)
    torch.testing.assert_close(fan_in, expected / config.initializer_range * 16**-0.5)


def test_how_weights_start_is_no_part_of_the_exported_architecture():
    assert to_hf(SCALED) == to_hf(ModelConfig())


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(ValueError, match=r"initialisation=xavier: must be one of fixed, fan_in"):
        replace(SCALED, initialisation="xavier").validate()

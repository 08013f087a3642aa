"""Losses of the first 50 steps of a preset, written down once: a change of arithmetic anywhere shows here.

The data are sequences with a rule, so that the loss (MTP's tenth included) falls. Medium and large presets do not fit
a test machine.
"""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.presets import LEARNING_RATES, PRESETS
from ray_pipeline.settings.schema import OptimizerConfig

STEPS, SHOWN = 50, (0, 10, 25, 49)
GOLDEN = {"tiny": (7.5864, 5.1160, 5.0743, 5.0692), "small": (7.3722, 5.1597, 5.0797, 5.0565)}


def batch(step: int, rows: int = 4, seq_len: int = 64) -> Batch:
    """Each row counts on by a stride of its own, modulo 97."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(1, 97, (rows, 1), generator=generator) for _ in range(2))
    tokens = (start + stride * torch.arange(seq_len)) % 97
    labels = torch.cat([tokens[:, 1:], torch.full((rows, 1), -100)], 1)
    return Batch(tokens, labels, torch.zeros_like(tokens))


@pytest.mark.parametrize("name", ["tiny", pytest.param("small", marks=pytest.mark.slow)])
def test_the_first_50_losses_of_a_preset_are_those_written_down(name):
    config = ModelConfig(vocab_size=512, max_position_embeddings=64, **PRESETS[name])
    rate = LEARNING_RATES[name][0]
    engine = Engine(
        config, Mesh(MeshSizes()), EngineOptions(optimizer=OptimizerConfig(lr=rate, warmup_steps=0), micro_batch=4)
    )
    objective = CrossEntropy(0.1)
    losses = [engine.train_step(batch(step), objective, rate).loss for step in range(STEPS)]
    # Kernels of other processors round differently, and 50 steps carry that on.
    torch.testing.assert_close([losses[step] for step in SHOWN], list(GOLDEN[name]), rtol=0, atol=5e-3)

"""How far trainer and sampler are apart, over all micro-batches."""

from __future__ import annotations

import math

import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.objectives.sampler_gap import SamplerGap


def test_figures_are_of_the_trained_tokens_of_all_micro_batches_and_start_anew():
    gap, mesh = SamplerGap(), Mesh(MeshSizes())
    assert gap.figures(mesh) == {}
    gap.observe(torch.tensor([[0.0, -0.5, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    gap.observe(torch.tensor([[0.25, 5e-4]]), torch.tensor([[1.0, 1.0]]))
    gap.observe(torch.tensor([[7.0]]), torch.tensor([[0.0]]))
    figures = gap.figures(mesh)
    differences = (0.0, -0.5, 0.25, 5e-4)
    assert figures["sampler_gap"] == pytest.approx(sum(map(abs, differences)) / 4)
    assert figures["sampler_gap_max"] == 0.5 and figures["sampler_gap_far"] == 0.5
    assert figures["sampler_kl"] == pytest.approx(sum(math.exp(d) - d - 1 for d in differences) / 4, rel=1e-5)
    assert gap.figures(mesh) == {}

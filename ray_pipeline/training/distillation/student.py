"""Where the student's weights start."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer


def teacher_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """Which teacher layer a student layer starts from: evenly spaced, first to first and last to last."""
    if student_layers == 1:
        return teacher_layers - 1
    return round(layer * (teacher_layers - 1) / (student_layers - 1))


@torch.no_grad()
def initial_student(
    config: ModelConfig, teacher: ModelConfig, teacher_state: dict[str, Tensor], init: str, seed: int
) -> dict[str, Tensor]:
    """State dict of the untrained student.

    With `init="teacher_layers"` every tensor starts from the corresponding teacher layer (as in DistilBERT,
    arXiv:1910.01108); where the student is narrower, or has fewer experts, from the first of the teacher's units.
    Where it is wider, and everywhere with `random`, weights are drawn from the seed.
    """
    model = Transformer(config)
    init_weights(model, config, seed)
    state = model.state_dict()
    if init == "random":
        return state
    for name, tensor in state.items():
        source = name
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            index = teacher_layer(int(layer), config.num_hidden_layers, teacher.num_hidden_layers)
            source = f"layers.{index}.{rest}"
        if source in teacher_state:
            _copy_leading(tensor, teacher_state[source], stacked=name.endswith("gate_up_proj"))
    return state


def _copy_leading(target: Tensor, source: Tensor, *, stacked: bool) -> None:
    """Copy the leading part of `source` that fits; `stacked`: dimension 1 holds gate rows, then up rows."""
    if stacked:
        target, source = target.unflatten(1, (2, -1)), source.unflatten(1, (2, -1))
    if target.dim() == source.dim() and all(t <= s for t, s in zip(target.shape, source.shape, strict=True)):
        target.copy_(source[tuple(slice(size) for size in target.shape)])

"""Where the student's weights start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert.selected import fresh_parameter
from model.transformer import Transformer


def teacher_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """Which teacher layer a student layer starts from: evenly spaced, first to first and last to last."""
    if student_layers == 1:
        return teacher_layers - 1
    return round(layer * (teacher_layers - 1) / (student_layers - 1))


class InitialStudent(Mapping[str, Tensor]):
    """Weights of the untrained student by name, each made when it is asked for.

    With `init="teacher_layers"` every tensor starts from the corresponding teacher layer (as in DistilBERT,
    arXiv:1910.01108); where the student is narrower, or has fewer experts, from the first of the teacher's units.
    Where it is wider, and everywhere with `random`, weights are drawn from the seed.
    """

    def __init__(
        self, config: ModelConfig, teacher: ModelConfig, teacher_state: Mapping[str, Tensor], init: str, seed: int
    ):
        self.config, self.teacher, self.teacher_state, self.seed = config, teacher, teacher_state, seed
        self.copies = init != "random"
        with torch.device("meta"):
            self._shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        tensor = fresh_parameter(name, self._shapes[name], self.config, self.seed)
        source = self._source(name)
        if self.copies and source in self.teacher_state:
            _copy_leading(tensor, self.teacher_state[source], stacked=name.endswith("gate_up_proj"))
        return tensor

    def _source(self, name: str) -> str:
        """The teacher's tensor that it starts from."""
        if not name.startswith("layers."):
            return name
        _, layer, rest = name.split(".", 2)
        index = teacher_layer(int(layer), self.config.num_hidden_layers, self.teacher.num_hidden_layers)
        return f"layers.{index}.{rest}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _copy_leading(target: Tensor, source: Tensor, *, stacked: bool) -> None:
    """Copy the leading part of `source` that fits; `stacked`: dimension 1 holds gate rows, then up rows."""
    if stacked:
        target, source = target.unflatten(1, (2, -1)), source.unflatten(1, (2, -1))
    if target.dim() == source.dim() and all(t <= s for t, s in zip(target.shape, source.shape, strict=True)):
        target.copy_(source[tuple(slice(size) for size in target.shape)])

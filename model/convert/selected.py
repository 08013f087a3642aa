"""Which published tensors of a model are kept: the others start anew, as they do in training. Reads no file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert.folder import Selection
from model.convert.names import published_slots
from model.init import initial_weight

_SHOWN = 12  # missing tensors listed by name


@dataclass(frozen=True)
class Selected:
    """A whole state dict, and what became of each published tensor.

    Attributes:
        taken: read. omitted: there, and not taken. missing: not there, which was allowed. Both start anew.
    """

    state: dict[str, Tensor]
    taken: tuple[str, ...]
    omitted: tuple[str, ...]
    missing: tuple[str, ...]


def select(
    config: ModelConfig, state: dict[str, Tensor], selection: Selection, held: Collection[str], *, seed: int = 0
) -> Selected:
    """Draw the tensors that are not taken anew, in the place where they lie in `state`.

    Args:
        state: all parameters. selection: patterns of published names. held: the published tensors that were read.
    Raises:
        ValueError: tensors that are missing and may not be, by name.
    """
    slots = {name: slot for name, slot in published_slots(config, state).items() if not slot.shared}
    taken = tuple(name for name in slots if name in held and selection.takes(name))
    omitted = tuple(name for name in slots if name in held and not selection.takes(name))
    missing = tuple(name for name in slots if name not in held)
    refused = [name for name in missing if not selection.may_miss(name)]
    if refused:
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise ValueError(f"{len(refused)} tensors are missing: {', '.join(refused[:_SHOWN])}{more}")
    drawn: dict[str, Tensor] = {}
    for name in (*omitted, *missing):
        slot = slots[name]
        if slot.name not in drawn:
            drawn[slot.name] = fresh_parameter(slot.name, state[slot.name].shape, config, seed)
        slot.view(state[slot.name]).copy_(slot.view(drawn[slot.name]))
    return Selected(state, taken, omitted, missing)


def outcome(config: ModelConfig, state: dict[str, Tensor], read: Collection[str], stored: Collection[str]) -> Selected:
    """What became of each tensor where a folder's `read` ones were taken from among `stored`."""
    names = [name for name, slot in published_slots(config, state).items() if not slot.shared]
    return Selected(
        state,
        tuple(name for name in names if name in read),
        tuple(name for name in names if name not in read and name in stored),
        tuple(name for name in names if name not in read and name not in stored),
    )


def fresh_parameter(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """A parameter or balancing bias as a new model has it."""
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    return initial_weight(name, shape, config, seed)

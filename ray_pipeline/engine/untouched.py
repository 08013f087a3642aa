"""Parameters that no gradient reached in a step: they keep their value and their moments, decay or not.

An objective that leaves a part of the model out (the MTP modules in SFT, the head where hidden states are matched) must
not shrink it. A gradient of zero is something else than none: experts are one stacked parameter, and those that got no
token in a step are decayed as every framework does it. A parameter counts as used if any replica used it.

The count of steps that AdamW corrects its averages by is the optimizer's, not a parameter's: sharded state has one for
all, and a checkpoint too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.parallel.mesh import Mesh


class Arrivals:
    """Which parameters got a gradient since the last step, on any replica.

    Args:
        named: by name in the whole model; the same on all replicas.
        by_hook: take note when a gradient arrives; where DeepSpeed takes them out of `.grad` at once.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], mesh: Mesh, *, by_hook: bool = False):
        self.named, self.mesh, self.by_hook = named, mesh, by_hook
        self._noted: set[str] = set()
        for name, parameter in named.items() if by_hook else ():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._noted.add(name))

    def here(self) -> set[str]:
        """Names of those that this rank's backwards reached, before gradients are reduced."""
        if not self.by_hook:
            return {name for name, parameter in self.named.items() if parameter.grad is not None}
        noted, self._noted = self._noted, set()
        return noted

    def missed(self, here: set[str]) -> set[str]:
        """Names of those that no replica reached. A message between replicas, at the same place on all of them."""
        if not self.named:
            return set()
        device = next(iter(self.named.values())).device
        found = torch.tensor([name in here for name in self.named], dtype=torch.float32, device=device)
        everywhere = self.mesh.all_reduce(found, "replica").tolist()
        return {name for name, count in zip(self.named, everywhere, strict=True) if count == 0}


def pass_over(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: tuple[str, ...]) -> None:
    """Count a step of a parameter that was not moved in it."""
    if not moments:
        return
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state.update({key: torch.zeros_like(parameter) for key in moments})
    state["step"] += 1


class KeptParts:
    """Puts parts of flat tensors back as they were before an optimizer's step, with their moments.

    Attributes:
        parts: flat parameter -> (start, length) of its parts, to be set before a step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, moments: tuple[str, ...]):
        self.moments = moments
        self.parts: dict[Tensor, list[tuple[int, int]]] = {}
        self._before: list[tuple[Tensor, str, int, Tensor]] = []
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._put_back)

    def _keep(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for flat in (flat for group in optimizer.param_groups for flat in group["params"]):
            for start, length in self.parts.get(flat, ()):
                self._before.append((flat, "", start, flat.detach()[start : start + length].clone()))
                for key in self.moments:
                    whole = optimizer.state.get(flat, {}).get(key)  # none before the first step
                    kept = flat.detach().new_zeros(length) if whole is None else whole[start : start + length].clone()
                    self._before.append((flat, key, start, kept))

    @torch.no_grad()
    def _put_back(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for flat, key, start, kept in self._before:
            whole = optimizer.state[flat][key] if key else flat
            whole[start : start + len(kept)] = kept
        self._before.clear()

"""From accumulated gradients to new weights: the interface, and ZeRO 0, which is our own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from model.parallel.mesh import Mesh
from ray_pipeline.config import OptimizerConfig
from ray_pipeline.engine.optimizer import MOMENTS, build_optimizer, clip_by_global_norm, is_cut_expert


class Updater(Protocol):
    """Turns accumulated gradients into new weights.

    Attributes:
        loss_scale: what every loss is multiplied by, so that the reduced gradient is that of the global loss.
    """

    optimizer: torch.optim.Optimizer
    loss_scale: float

    def step(self) -> float:
        """Reduce gradients over replicas, clip, update, clear. Returns the global norm before clipping."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """This rank's slices of the weights, on every replica whole."""
        ...

    def state(self) -> dict[str, Tensor]:
        """fp32 weights and moments of this rank's slices: `model.*`, `exp_avg.*`, `exp_avg_sq.*`, `step`."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`, in place."""
        ...


class PlainUpdater:
    """ZeRO 0: every replica keeps everything; gradients are summed in one flat message.

    Args:
        named: this rank's parameters by global name.
    """

    loss_scale = 1.0

    def __init__(self, named: dict[str, nn.Parameter], mesh: Mesh, config: OptimizerConfig):
        self.named, self.mesh, self.grad_clip = named, mesh, config.grad_clip
        self.moments = MOMENTS[config.name]
        self.optimizer = build_optimizer(named, config, mesh)

    def step(self) -> float:
        for parameter in self.named.values():
            if parameter.grad is None:  # an expert or MTP module that no token reached
                parameter.grad = torch.zeros_like(parameter)
        self._reduce([p for n, p in self.named.items() if not is_cut_expert(n, self.mesh)], "replica")
        self._reduce([p for n, p in self.named.items() if is_cut_expert(n, self.mesh)], "expert_replica")
        gradients = {name: parameter.grad for name, parameter in self.named.items() if parameter.grad is not None}
        norm = clip_by_global_norm(gradients, self.grad_clip, self.mesh)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _reduce(self, parameters: list[nn.Parameter], axis: str) -> None:
        """Sum gradients; they become views of the message, which saves copying them back."""
        if not parameters or self.mesh.axis(axis).size == 1:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        self.mesh.all_reduce(flat, axis)
        for parameter, reduced in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = reduced.view_as(parameter)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named.items()}

    def state(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {"step": torch.zeros(())}
        for name, parameter in self.named.items():
            held = self.optimizer.state.get(parameter) or {}
            out[f"model.{name}"] = parameter.detach()
            for key in self.moments:
                out[f"{key}.{name}"] = held[key] if held else torch.zeros_like(parameter)
            if held and self.moments:
                out["step"] = held["step"].detach().float().cpu().reshape(())
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.named.items():
            parameter.copy_(state[f"model.{name}"])
            if self.moments:
                moments = {key: state[f"{key}.{name}"].clone() for key in self.moments}
                self.optimizer.state[parameter] = {"step": state["step"].clone().to(parameter.device), **moments}

"""From accumulated gradients to new weights: the interface, and ZeRO 0, which is our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from model.kernels.weight_gradients import BackwardSplit
from model.parallel.mesh import Mesh
from ray_pipeline.engine.optimizer import build_optimizer, clipped_step, global_norm, is_cut_expert, moments_of
from ray_pipeline.engine.reduction import GradientReduction
from ray_pipeline.engine.untouched import Arrivals, pass_over
from ray_pipeline.settings.schema import OptimizerConfig


class Updater(Protocol):
    """Turns accumulated gradients into new weights.

    Attributes:
        loss_scale: what every loss is multiplied by, so that the reduced gradient is that of the global loss.
    """

    optimizer: torch.optim.Optimizer
    loss_scale: float

    def expect(self, backwards: int) -> None:
        """A step begins in which each part of the model runs this many backwards."""
        ...

    def step(self, accept: Callable[[float], bool] | None = None) -> tuple[float, bool]:
        """Reduce gradients over replicas, clip, update, clear.

        Args:
            accept: asked with the norm; False: nothing is updated. ZeRO 0 alone.
        Returns:
            The global norm before clipping, and whether the weights were updated.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """This rank's slices of the weights, on every replica whole."""
        ...

    def held(self) -> Iterable[Tensor]:
        """The fp32 weights that this rank moves, in whatever shape; together the ranks hold all of them."""
        ...

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Within, these parameters are whole on this rank, trained or frozen."""
        ...

    def state(self) -> dict[str, Tensor]:
        """fp32 weights and moments of this rank's slices: `model.*`, `exp_avg.*` and so on, and `step`."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`, in place."""
        ...


class PlainUpdater:
    """ZeRO 0: every replica keeps everything; gradients are summed while the last backward runs.

    Args:
        named: this rank's parameters by global name. split: as the model's layers have it.
    """

    loss_scale = 1.0

    def __init__(
        self, named: dict[str, nn.Parameter], mesh: Mesh, config: OptimizerConfig, split: BackwardSplit | None = None
    ):
        self.named, self.mesh, self.grad_clip = named, mesh, config.grad_clip
        self.moments = {name: moments_of(name, parameter, config) for name, parameter in named.items()}
        self.optimizer = build_optimizer(named, config, mesh)
        self.arrivals = Arrivals(named, mesh)
        self.device = next(iter(named.values())).device
        dense = [p for name, p in named.items() if not is_cut_expert(name, mesh)]
        experts = [p for name, p in named.items() if is_cut_expert(name, mesh)]
        self.reductions = [
            GradientReduction(dense, mesh.axis("replica"), split),
            GradientReduction(experts, mesh.axis("expert_replica"), split),
        ]

    def expect(self, backwards: int) -> None:
        for reduction in self.reductions:
            reduction.expect(backwards)

    def step(self, accept: Callable[[float], bool] | None = None) -> tuple[float, bool]:
        here = self.arrivals.here()
        for reduction in self.reductions:
            reduction.finish()
        missed = self.arrivals.missed(here)
        gradients: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            if name in missed:
                parameter.grad = None
                continue
            if parameter.grad is None:  # experts whose tokens all are on other ranks
                parameter.grad = torch.zeros_like(parameter)
            gradients[name] = parameter.grad
        norm = global_norm(gradients, self.mesh, self.device)
        taken = accept is None or accept(float(norm))
        if taken:
            clipped_step(self.optimizer, norm, self.grad_clip)
            for name in missed:
                pass_over(self.optimizer, self.named[name], self.moments[name])
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm), taken

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named.items()}

    def held(self) -> Iterable[Tensor]:
        return self.named.values()

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {"step": torch.zeros(())}
        for name, parameter in self.named.items():
            held = self.optimizer.state.get(parameter) or {}
            out[f"model.{name}"] = parameter.detach()
            for key in self.moments[name]:
                out[f"{key}.{name}"] = held[key] if held else torch.zeros_like(parameter)
            if held and self.moments[name]:
                out["step"] = held["step"].detach().float().cpu().reshape(())
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.named.items():
            parameter.copy_(state[f"model.{name}"])
            if self.moments[name]:
                moments = {key: state[f"{key}.{name}"].clone() for key in self.moments[name]}
                self.optimizer.state[parameter] = {"step": state["step"].clone().to(parameter.device), **moments}

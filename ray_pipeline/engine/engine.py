"""One engine for every layout: micro-batches through the pipeline, gradients over replicas, one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.init import init_weights
from model.moe.router import Router
from model.parallel.mesh import Mesh, split_layers
from model.transformer import Transformer
from ray_pipeline.config import OptimizerConfig
from ray_pipeline.data.batch import Batch
from ray_pipeline.engine.optimizer import build_adamw, clip_by_global_norm
from ray_pipeline.engine.pipeline import Finish, PipelineStage
from ray_pipeline.engine.schedule import forward_only, one_forward_one_backward
from ray_pipeline.objectives.base import Objective


@dataclass(frozen=True)
class StepStats:
    """One optimizer step as every rank knows it: mean loss, norm before clipping, sums of the objective's metrics."""

    loss: float
    grad_norm: float
    weight: float
    metrics: dict[str, float]


class Updater(Protocol):
    """Turns accumulated gradients into new weights."""

    optimizer: torch.optim.Optimizer

    def step(self) -> float:
        """Reduce gradients over replicas, clip, update, clear. Returns the global norm before clipping."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Full fp32 weights and moments of this stage's parameters: `model.*`, `exp_avg.*`, `exp_avg_sq.*`, `step`."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`, in place."""
        ...


class PlainUpdater:
    """ZeRO 0: every replica keeps everything; gradients are summed in one flat message."""

    def __init__(self, model: Transformer, mesh: Mesh, config: OptimizerConfig):
        self.model, self.mesh, self.grad_clip = model, mesh, config.grad_clip
        self.optimizer: torch.optim.Optimizer = build_adamw(model, config)

    def step(self) -> float:
        gradients = []
        for parameter in self.model.parameters():
            if parameter.grad is None:  # an expert or MTP module that no token reached
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.mesh.dp > 1:
            flat = self.mesh.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), "dp")
            for gradient, reduced in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(reduced.view_as(gradient))
        norm = clip_by_global_norm(gradients, self.grad_clip, self.mesh)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {"step": torch.zeros(())}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter) or {}
            out[f"model.{name}"] = parameter.detach()
            for key in ("exp_avg", "exp_avg_sq"):
                out[f"{key}.{name}"] = moments[key] if moments else torch.zeros_like(parameter)
            if moments:
                out["step"] = moments["step"].detach().float().cpu().reshape(())
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[f"model.{name}"])
            moments = {key: state[f"{key}.{name}"].clone() for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": state["step"].clone().to(parameter.device), **moments}


def pipeline_layers(config: ModelConfig, stages: int) -> list[range]:
    """Layers of each pipeline stage, balanced by active weights; the head and the MTP modules weigh on the last one."""
    return split_layers(config.num_hidden_layers, stages, config.tail_params() / config.layer_params(1, active=True))


class Engine:
    """A model laid out over a mesh, with its optimizer.

    Args:
        optimizer: None for a model that is only read (reference, teacher).
        zero_stage: 0 or 1; 1 shards optimizer state over replicas through DeepSpeed.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        seed: int = 0,
        optimizer: OptimizerConfig | None = None,
        zero_stage: int = 0,
        precision: str = "fp32",
        micro_batch: int = 8,
        device: torch.device | None = None,
        initial: dict[str, Tensor] | None = None,
    ):
        self.config, self.mesh, self.micro_batch = config, mesh, micro_batch
        self.device = device or torch.device("cpu")
        self.model = Transformer(config, pipeline_layers(config, mesh.sizes.pp)[mesh.pp_rank])
        if initial is None:
            init_weights(self.model, config, seed)
        else:
            own = self.model.state_dict()
            self.model.load_state_dict({name: initial[name] for name in own})
        self.model.to(self.device).train(optimizer is not None)
        dtype = torch.bfloat16 if precision == "bf16" else None
        # Weights, residual stream and optimizer stay fp32 in bf16 runs; matmuls run in bf16 under autocast.
        self.stage = PipelineStage(self.model, mesh, autocast_dtype=dtype)
        self.routers = [module for module in self.model.modules() if isinstance(module, Router)]
        self.updater: Updater | None = None
        if optimizer is not None and zero_stage == 0:
            self.updater = PlainUpdater(self.model, mesh, optimizer)
        elif optimizer is not None:
            from ray_pipeline.engine.zero import ZeroUpdater  # DeepSpeed takes seconds to import

            self.updater = ZeroUpdater(self.model, mesh, optimizer, zero_stage)
        else:
            self.model.requires_grad_(False)

    def my_rows(self, batch: Batch) -> Batch:
        """The rows of a global batch that this replica reads."""
        rows, dp = len(batch), self.mesh.dp
        if rows % dp:
            raise ValueError(f"a batch of {rows} rows cannot be split over dp={dp} replicas")
        share = rows // dp
        return batch.rows(self.mesh.dp_rank * share, (self.mesh.dp_rank + 1) * share).to(self.device)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        return [batch.rows(i, min(i + self.micro_batch, len(batch))) for i in range(0, len(batch), self.micro_batch)]

    def train_step(self, batch: Batch, objective: Objective, lr: float) -> StepStats:
        """One optimizer step on a global batch (every rank is given the same one)."""
        assert self.updater is not None
        mine = self.my_rows(batch)
        weight = self._sum_over_replicas(objective.weight(mine))
        if weight == 0:
            raise ValueError("a batch without a single trained token")
        sums: list[Tensor] = []

        def finish(model: Transformer, hidden: Tensor, embeddings: Tensor | None, rows: Batch) -> Tensor:
            values = objective(model, hidden, embeddings, rows)
            sums.append(values.detach())
            return values[0] / weight

        micro_batches = self._micro_batches(mine)
        schedule = one_forward_one_backward(self.mesh.pp_rank, self.mesh.sizes.pp, len(micro_batches))
        self.stage.run(schedule, micro_batches, finish)
        for group in self.updater.optimizer.param_groups:
            group["lr"] = lr
        norm = self.updater.step()
        self._balance_experts()
        loss, metrics = self._totals(sums, objective)
        return StepStats(loss / weight, norm, weight, metrics)

    def evaluate(self, batch: Batch, objective: Objective) -> StepStats:
        """The objective on a global batch, forward only: loss is the mean over the batch's weight."""
        mine = self.my_rows(batch)
        weight = self._sum_over_replicas(objective.weight(mine))
        sums = self.forward(mine, objective)
        loss, metrics = self._totals(sums, objective)
        return StepStats(loss / max(weight, 1.0), 0.0, weight, metrics)

    def forward(self, mine: Batch, finish: Finish) -> list[Tensor]:
        """`finish` of every micro-batch of this replica's rows, on the last stage; an empty list elsewhere."""
        training = self.model.training
        self.model.eval()
        micro_batches = self._micro_batches(mine)
        results = self.stage.run(forward_only(len(micro_batches)), micro_batches, finish)
        self.model.train(training)
        return results

    def _balance_experts(self) -> None:
        if self.routers:
            loads = self.mesh.all_reduce(torch.stack([router.load for router in self.routers]), "dp")
            for router, load in zip(self.routers, loads, strict=True):
                router.load.copy_(load)
                router.balance()

    def _sum_over_replicas(self, value: float) -> float:
        return float(self.mesh.all_reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "dp"))

    def _totals(self, sums: Sequence[Tensor], objective: Objective) -> tuple[float, dict[str, float]]:
        """Loss sum and metric sums over all micro-batches and replicas, known to every rank."""
        total = torch.zeros(1 + len(objective.metric_names), dtype=torch.float64, device=self.device)
        for values in sums:
            total += values
        self.mesh.all_reduce(self.mesh.all_reduce(total, "dp"), "pp")
        loss, *metrics = total.tolist()
        return loss, dict(zip(objective.metric_names, metrics, strict=True))

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        """The whole model's state dict on every rank, on the CPU: each stage broadcasts its part down the pipeline."""
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        if self.mesh.sizes.pp == 1:
            return {name: tensor.clone() for name, tensor in state.items()}
        layout: list[list[tuple[str, torch.Size]] | None] = [None] * self.mesh.sizes.pp
        group = self.mesh.group("pp")
        dist.all_gather_object(layout, [(name, tensor.shape) for name, tensor in state.items()], group=group)
        out: dict[str, Tensor] = {}
        for source, entries in zip(self.mesh.ranks("pp"), layout, strict=True):
            assert entries is not None
            if source == self.mesh.rank:
                flat = torch.cat([tensor.float().flatten() for tensor in state.values()])
            else:
                flat = torch.empty(sum(shape.numel() for _, shape in entries))
            flat = flat.to(self.device)
            dist.broadcast(flat, source, group=group)
            parts = flat.cpu().split([shape.numel() for _, shape in entries])
            out |= {name: part.view(shape) for (name, shape), part in zip(entries, parts, strict=True)}
        return out


def all_ranks_gather(mesh: Mesh, value: object) -> list:
    """`value` of every rank, in rank order."""
    if mesh.world == 1:
        return [value]
    out: list = [None] * mesh.world
    dist.all_gather_object(out, value)
    return out



"""The same model under plain torch, DistributedDataParallel and FSDP2, each at the settings that were fastest here.

The global batch is known to every rank, so the peers count its weight without a message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.init import initial_weight
from model.moe.router import Router
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import IGNORE, Batch
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from scripts.parallel_bench.task import MTP_WEIGHT, SEED, Row, Task

Step = Callable[[Batch], tuple[float, float]]
"""One optimizer step on a global batch -> (mean loss, gradient norm before clipping)."""


def build_model(task: Task, device: torch.device, layers: range | None = None) -> Transformer:
    """The weights that the engine draws from the same seed."""
    model = Transformer(task.model, layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, task.model, SEED))
    return model.to(device).train()


class WithLoss(nn.Module):
    """Forward is the loss sum of a micro-batch, as the wrappers want it."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model
        self.objective = CrossEntropy(MTP_WEIGHT)

    def forward(self, tokens: Tensor, labels: Tensor, doc_ids: Tensor) -> Tensor:
        model = self.model
        rotation, mask = model.context(doc_ids, tokens.shape[1])
        hidden, ahead = model.embed(tokens)
        hidden = model.norm(model.run_layers(hidden, rotation, mask))
        return self.objective(model, hidden, ahead, Batch(tokens, labels, doc_ids))[0].clone()  # FSDP2 wants no view


def build_adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The engine's optimizer: decay on matrices alone, fused."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def balance_routers(model: nn.Module, *, replicas: int = 1) -> None:
    """The router's bias update, which is part of the model, with one message over the replicas."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        return
    loads = torch.stack([router.load for router in routers])
    if replicas > 1:
        dist.all_reduce(loads)
    for router, load in zip(routers, loads, strict=True):
        router.load.copy_(load)
        router.balance()


def trained_tokens(batch: Batch) -> float:
    return float((batch.labels != IGNORE).sum())


def _replica_step(
    task: Task,
    row: Row,
    module: nn.Module,
    device: torch.device,
    last_one: Callable[[bool], Any],
    **clip: Any,
) -> Step:
    """The loop of all three: micro-batches, clip, AdamW, router bias, one message for the reported loss.

    Args:
        last_one: (whether it is the last micro-batch) -> context of its forward and backward.
    """
    optimizer = build_adamw(module.parameters(), task.optimizer)
    parameters = list(module.parameters())
    share, rank = task.rows // row.ranks, dist.get_rank() if row.ranks > 1 else 0

    def step(batch: Batch) -> tuple[float, float]:
        weight = trained_tokens(batch)
        mine = batch.rows(rank * share, (rank + 1) * share).to(device)
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for start in range(0, share, row.micro_batch):
            part = mine.rows(start, start + row.micro_batch)
            with last_one(start + row.micro_batch >= share):
                loss = module(part.tokens, part.labels, part.doc_ids)
                total += loss.detach()
                # The wrappers average gradients over the ranks.
                (loss * (row.ranks / weight)).backward()
        norm: Any = nn.utils.clip_grad_norm_(parameters, task.optimizer.grad_clip, **clip)
        optimizer.step()
        optimizer.zero_grad()
        balance_routers(module, replicas=row.ranks)
        if row.ranks > 1:
            dist.all_reduce(total)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return float(total) / weight, float(norm)

    return step


def build_plain(task: Task, row: Row, device: torch.device) -> Step:
    """One process and nothing around the model: the reference for everybody's losses."""
    return _replica_step(task, row, WithLoss(build_model(task, device)), device, lambda last: nullcontext())


def build_ddp(task: Task, row: Row, device: torch.device) -> Step:
    """DistributedDataParallel (arXiv:2006.15704)."""
    settings = {"gradient_as_bucket_view": True, "forward_sync_buffers": False, **row.settings}
    module = nn.parallel.DistributedDataParallel(WithLoss(build_model(task, device)), **settings)
    return _replica_step(task, row, module, device, lambda last: nullcontext() if last else module.no_sync())


def build_fsdp2(task: Task, row: Row, device: torch.device) -> Step:
    """FSDP2 (`fully_shard`), block by block.

    Stage 1: whole gradients until the last micro-batch; 2: gradients of every micro-batch are sharded at once; 3:
    weights are sharded again after each forward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    stage = row.settings["stage"]
    mesh = init_device_mesh(device.type, (row.ranks,))
    module = WithLoss(build_model(task, device))
    blocks = [*module.model.layers.values(), *module.model.mtp] if row.settings.get("by_block", True) else []
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=stage == 3)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)

    def last_one(last: bool) -> Any:
        module.set_requires_gradient_sync(last or stage > 1)
        module.set_is_last_backward(last)
        return nullcontext()

    return _replica_step(task, row, module, device, last_one)

"""The same model, cut at the same layers, under `torch.distributed.pipelining`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parallel.placement import num_stages, parts_of, stage_layers
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from scripts.parallel_bench.peers import Step, balance_routers, build_adamw, build_model, trained_tokens
from scripts.parallel_bench.task import MTP_WEIGHT, Row, Task


class Stage(nn.Module):
    """One part of the model: tokens or carried tensors in, carried tensors or the micro-batch's loss sum out."""

    def __init__(self, part: Transformer):
        super().__init__()
        self.part = part
        self.objective = CrossEntropy(MTP_WEIGHT)

    def forward(self, *carried: Tensor, labels: Tensor, doc_ids: Tensor) -> Any:
        part = self.part
        rotation, mask = part.context(doc_ids, doc_ids.shape[1])
        hidden, ahead = part.embed(carried[0]) if part.is_first else carried
        hidden = part.run_layers(hidden, rotation, mask)
        if not part.is_last:
            return hidden, ahead
        return self.objective(part, part.norm(hidden), ahead, Batch(doc_ids, labels, doc_ids))[0]


def _schedule(name: str, stages: list[Any], micro_batches: int) -> Any:
    from torch.distributed.pipelining import schedules

    kinds = {
        "1f1b": schedules.Schedule1F1B,
        "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
        "zbv": schedules.ScheduleZBVZeroBubble,
        "dualpipev": schedules.ScheduleDualPipeV,
    }
    given: Any = stages[0] if name == "1f1b" else stages
    # The last stage's output is the loss already.
    return kinds[name](given, micro_batches, loss_fn=lambda loss, weight: loss / weight[0], scale_grads=False)


def _stages(task: Task, row: Row, device: torch.device) -> list[Any]:
    """This rank's stages. Shapes are given: to infer them, torch runs the model once, and routers would count that."""
    from torch.distributed.pipelining import PipelineStage

    name, micro, width = row.settings["schedule"], row.micro_batch, task.model.hidden_size
    count = num_stages(name, row.ranks)
    layers = stage_layers(task.model, count)
    out = []
    for index in parts_of(name, row.ranks, dist.get_rank()):
        part = build_model(task, device, layers[index])
        lengths = (task.seq_len, part.ahead_length(task.seq_len))
        carried = [torch.empty(micro, length, width, device=device, requires_grad=True) for length in lengths]
        tokens = torch.empty(micro, task.seq_len, dtype=torch.int64, device=device)
        loss = torch.empty((), device=device, requires_grad=True)
        inputs = [tokens] if part.is_first else carried
        outputs = [loss] if part.is_last else carried
        shapes: Any = {"input_args": tuple(inputs), "output_args": tuple(outputs)}
        out.append(PipelineStage(Stage(part), index, count, device, **shapes))
    return out


def _clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """`clip_grad_norm_` over all ranks of the pipeline."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    square = norm.square()
    dist.all_reduce(square)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, square.sqrt())
    return float(square.sqrt())


def build_pipelining(task: Task, row: Row, device: torch.device) -> Step:
    """Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble or ScheduleDualPipeV."""
    stages = _stages(task, row, device)
    micro_batches = task.rows // row.micro_batch
    schedule = _schedule(row.settings["schedule"], stages, micro_batches)
    modules = nn.ModuleList(stage.submod for stage in stages)
    parameters = list(modules.parameters())
    optimizer = build_adamw(parameters, task.optimizer)
    first, last = any(s.is_first for s in stages), any(s.is_last for s in stages)

    def step(batch: Batch) -> tuple[float, float]:
        batch, weight = batch.to(device), trained_tokens(batch)
        losses: list[Tensor] = []
        inputs = (batch.tokens,) if first else ()
        target = torch.full((micro_batches,), weight, device=device) if last else None
        schedule.step(
            *inputs, target=target, losses=losses, return_outputs=False, labels=batch.labels, doc_ids=batch.doc_ids
        )
        norm = _clip(parameters, task.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        balance_routers(modules)
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for loss in losses:
            total += loss.detach()
        dist.all_reduce(total)
        return float(total), norm

    return step

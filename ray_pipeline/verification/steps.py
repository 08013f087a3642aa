"""The steps that are compared: same seed, same batches, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor

from model.moe.router import Router
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.batch import IGNORE, Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.verification.cases import MTP_WEIGHT, OPTIMIZERS, Case, Subject, micro_batch


@dataclass
class Trace:
    """What a layout did.

    Attributes:
        losses: per step, then of a last forward pass without training. norms: global, before clipping, per step.
        parts: per step, the objective's metrics and the number of trained tokens.
        loads: per step, router -> tokens each expert got, over all ranks.
        weights: the whole model's state dict after the last step, on the CPU.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    loads: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def make_batch(subject: Subject, step: int) -> Batch:
    """Random tokens, two documents a row, with the border at another place in each."""
    generator = torch.Generator().manual_seed((1000 * subject.seed + step) % 2**63)  # torch takes no more
    rows, length = subject.rows, subject.seq_len
    tokens = torch.randint(0, subject.model.vocab_size, (rows, length), generator=generator)
    border = torch.randint(1, length, (rows, 1), generator=generator)
    doc_ids = (torch.arange(length)[None] >= border).long()
    labels = torch.cat([tokens[:, 1:], torch.full((rows, 1), IGNORE)], 1)
    labels[:, :-1][doc_ids[:, 1:] != doc_ids[:, :-1]] = IGNORE
    return Batch(tokens, labels, doc_ids)


def take_steps(
    case: Case, *, device: torch.device | None = None, timeout: float = 600.0, whole_batch: bool = False
) -> tuple[Trace, Engine]:
    """Train `subject.steps` steps in the case's layout; every rank of it calls this.

    All get the same trace but for `loads`, which hold the routers of this rank.

    Args:
        timeout: seconds a collective may wait.
        whole_batch: one forward pass for all rows, as the reference does it.
    """
    subject, layout = case.subject, case.layout
    sizes = MeshSizes(**layout.sizes())
    optimizer = OPTIMIZERS[case.optimizer]
    engine = Engine(
        subject.model,
        Mesh(sizes, timeout=timedelta(seconds=timeout)),
        seed=subject.seed,
        optimizer=optimizer,
        zero_stage=layout.zero_stage,
        precision=case.precision,
        micro_batch=subject.rows if whole_batch else micro_batch(subject, layout),
        device=device,
        schedule=layout.schedule,
        pp_layout=layout.pp_layout,
        activation_checkpointing=layout.activation_checkpointing,  # type: ignore[arg-type]
        offload_optimizer=layout.offload_optimizer,
    )
    objective, trace = CrossEntropy(MTP_WEIGHT), Trace()
    for step in range(subject.steps):
        trace.loads.append({})
        for name, router in engine.routers.items():
            _record_load(router, name, trace.loads[-1])
        stats = engine.train_step(make_batch(subject, step), objective, optimizer.lr)
        trace.losses.append(stats.loss)
        trace.norms.append(stats.grad_norm)
        trace.parts.append(stats.metrics | {"tokens": stats.weight})
    trace.losses.append(engine.evaluate(make_batch(subject, subject.steps), objective).loss)
    trace.weights = engine.full_state()
    return trace, engine


def _record_load(router: Router, name: str, into: dict[str, Tensor]) -> None:
    """Keep the load that `balance` sees (summed over replicas by then) before it is cleared."""

    def balance() -> None:
        into[name] = router.load.cpu().clone()
        type(router).balance(router)

    router.balance = balance  # type: ignore[method-assign]

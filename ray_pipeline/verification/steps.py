"""The steps that are compared: same seed, same batches, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.moe.router import Router
from model.parallel.mesh import Mesh
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.verification.cases import LEAST_MARGIN, Case
from ray_pipeline.verification.made_data import write_data
from ray_pipeline.verification.trainings import Training, made_rank, start


@dataclass
class Trace:
    """What a layout did.

    Attributes:
        losses: per step, then of a last forward pass without training. norms: global, before clipping, per step.
        parts: per step, the objective's metrics and the number of trained tokens, pairs or answers.
        loads: per step, router -> tokens each expert got, over all ranks.
        weights: the whole model's state dict after the last step, on the CPU.
        seed: of one process: that it was made with. margin: the least difference between the scores of an expert that
            was chosen and of one that was not.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    loads: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    margin: float = math.inf


def take_reference(case: Case, mesh: Mesh, *, device: torch.device, folder: Path, data: Path) -> Trace:
    """The steps of one process, with the first of the subject's seeds in which no choice hangs on rounding.

    Layouts add in different orders. Where two experts' scores are alike in their seventh digit, one layout takes the
    one and another the other, both rightly, and no bound on losses or weights tells that from a fault. If every seed
    has such a tie the last one stands.
    """
    trace = Trace()
    for seed in range(case.subject.seed, case.subject.seed + case.subject.seeds):
        chosen = case.with_seed(seed)
        write_data(data / str(seed), chosen.subject)
        with least_margin() as margins:
            trace = take_steps(
                chosen, mesh, device=device, folder=folder / str(seed), data=data / str(seed), whole_batch=True
            )
        trace.seed, trace.margin = seed, min(margins, default=math.inf)
        if trace.margin >= LEAST_MARGIN:
            break
    return trace


@contextmanager
def least_margin() -> Iterator[list[float]]:
    """A list that grows by the least margin of every choice of every router in this process: in V3 by score and bias;
    its balancing loss counts what the scores alone would choose.
    """
    margins: list[float] = []
    choose = Router._choose

    def watched(router: Router, scores: Tensor) -> Tensor:
        biased = [scores + router.e_score_correction_bias] if router.has_bias else []
        k = router.config.num_experts_per_tok
        if k < scores.shape[1]:
            for values in (scores, *biased):
                largest = values.topk(k + 1, dim=-1).values
                margins.append(float((largest[:, -2] - largest[:, -1]).min()))
        return choose(router, scores)

    Router._choose = watched  # type: ignore[method-assign,assignment]
    try:
        yield margins
    finally:
        Router._choose = choose  # type: ignore[method-assign]


def take_steps(
    case: Case, mesh: Mesh, *, device: torch.device, folder: Path, data: Path, whole_batch: bool = False
) -> Trace:
    """Train `subject.steps` steps in the case's layout; every rank of it calls this. Arguments as `made_rank`'s.

    All get the same trace but for `loads`, which hold the routers of this rank.
    """
    rank = made_rank(case, mesh, device=device, folder=folder, data=data, whole_batch=whole_batch)
    training, trace = start(rank, case.subject), Trace()
    engine, steps = training.engine, case.subject.steps
    for step in range(steps):
        trace.loads.append({})
        for name, router in engine.routers.items():
            _record_load(router, name, trace.loads[-1])
        stats = engine.train_step(_filled(training, step), training.objective, rank.settings.optimizer.lr)
        trace.losses.append(stats.loss)
        trace.norms.append(stats.grad_norm)
        trace.parts.append(stats.metrics | {"tokens": stats.weight})
    trace.losses.append(engine.evaluate(_filled(training, steps), training.objective).loss)
    trace.weights = engine.full_state()
    return trace


def _filled(training: Training, step: int) -> Batch:
    batch = training.source.batch(step)
    assert batch is not None, "some answers of every iteration are cut off, others not"
    return training.engine.fitted(batch)


def _record_load(router: Router, name: str, into: dict[str, Tensor]) -> None:
    """Keep the load that `balance` sees (summed over replicas by then) before it is cleared."""

    def balance() -> None:
        into[name] = router.load.cpu().clone()
        type(router).balance(router)

    router.balance = balance  # type: ignore[method-assign]

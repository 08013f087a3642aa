"""The executor on real ranks: every schedule gives one process's losses and gradients, with toy modules as parts."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.build import split_backward
from model.kernels.weight_gradients import BackwardSplit
from model.layers.linear import Linear
from model.parallel.collectives import CollectiveFailed
from model.parallel.mesh import Mesh, MeshSizes
from model.parallel.placement import num_stages, parts_of
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.pipeline.pipeline import Pipeline
from tests.distributed import run_ranks

WIDTH, VOCAB, SEQ = 8, 11, 5
SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv", "dualpipev")


class Part(nn.Module):
    """A stage of a toy model: embedding first, two deferrable products and a norm, a loss last.

    `recompute`: forget the inner activations and run forward again in backward.
    """

    recompute = False

    def __init__(self, stage: int, stages: int):
        super().__init__()
        torch.manual_seed(stage)
        self.first, self.last = stage == 0, stage == stages - 1
        if self.first:
            self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up, self.norm, self.down = Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(2 * WIDTH), Linear(2 * WIDTH, WIDTH)
        self.head = Linear(WIDTH, VOCAB) if self.last else None

    def forward(self, carried: list[torch.Tensor], batch: Batch, output) -> list[torch.Tensor]:
        hidden, ahead = [self.embed(batch.tokens)] * 2 if self.first else carried
        hidden = checkpoint(self.layer, hidden, use_reentrant=False) if self.recompute else self.layer(hidden)
        return [output(self, hidden, ahead, batch)] if self.last else [hidden, ahead]

    def layer(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.norm(self.up(hidden)).tanh())


def loss(part, hidden, ahead, batch):
    # `ahead` reaches the loss past all stages, as the embeddings do for the MTP modules.
    return nn.functional.cross_entropy(part.head(hidden + ahead).flatten(0, 1), batch.labels.flatten(), reduction="sum")


def batches(count: int) -> list[Batch]:
    """Micro-batches of two rows, the last one of one row."""
    generator = torch.Generator().manual_seed(7)
    rows = [2] * (count - 1) + [1]
    tokens = [torch.randint(VOCAB, (n, SEQ + 1), generator=generator) for n in rows]
    return [Batch(t[:, :-1], t[:, 1:], torch.zeros_like(t[:, 1:])) for t in tokens]


def gradients(parts: dict[int, Part]) -> dict[str, torch.Tensor]:
    return {f"{s}.{name}": p.grad for s, part in parts.items() for name, p in part.named_parameters()}


def one_process(stages: int, count: int):
    """Losses and gradients without any pipeline."""
    parts = {stage: Part(stage, stages) for stage in range(stages)}
    losses = []
    for batch in batches(count):
        carried: list[torch.Tensor] = []
        for part in parts.values():
            carried = part(carried, batch, loss)
        carried[0].backward()
        losses.append(carried[0].detach())
    return losses, gradients(parts)


@dataclass
class Local:
    """A rank's parts, and how often a backward was announced."""

    parts: list[Part]
    backwards: int = 0

    def run(self, index, carried, batch, output):
        return self.parts[index](carried, batch, output)

    def carried_shapes(self, batch):
        return [(*batch.tokens.shape, WIDTH)] * 2

    def before_backward(self):
        self.backwards += 1


def pipeline(name: str, pp: int):
    mesh = Mesh(MeshSizes(pp=pp))
    parts = {stage: Part(stage, num_stages(name, pp)) for stage in parts_of(name, pp, mesh.pp_rank)}
    local, split = Local(list(parts.values())), BackwardSplit()
    for part in parts.values():
        split_backward(part, split)
    return Pipeline(mesh, name, torch.device("cpu"), local, split), parts, local


def train_on_rank(rank: int, name: str, pp: int, count: int, recompute: bool = False):
    executor, parts, local = pipeline(name, pp)
    for part in parts.values():
        part.recompute = recompute
    losses = executor.run(batches(count), loss, train=True)
    assert local.backwards == count * len(parts)
    return losses, gradients(parts)


def check(out: list, name: str, pp: int, count: int) -> None:
    expected, expected_grads = one_process(num_stages(name, pp), count)
    losses = [found for found, _ in out if found]
    assert len(losses) == 1, "only the rank with the last stage knows losses"
    torch.testing.assert_close(losses[0], expected, rtol=1e-6, atol=1e-6)
    merged = {key: grad for _, grads in out for key, grad in grads.items()}
    assert merged.keys() == expected_grads.keys()
    for key, grad in expected_grads.items():
        torch.testing.assert_close(merged[key], grad, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_rank_without_messages_equals_plain_backward(name, recompute):
    check([train_on_rank(0, name, 1, 3, recompute)], name, 1, 3)


def train_all(rank: int, pp: int, counts: dict[str, list[int]]):
    return {(name, count): train_on_rank(rank, name, pp, count) for name in counts for count in counts[name]}


@pytest.mark.parametrize("pp", [2, 3])
def test_every_schedule_gives_one_process_losses_and_gradients(pp):
    # Fewer micro-batches than ranks, a count that pp does not divide, and a long run.
    counts = {name: [pp - 1, pp + 1, 2 * pp + 1] for name in SCHEDULES}
    counts["dualpipev"] = [2 * pp, 2 * pp + 1]
    out = run_ranks(train_all, pp, pp, counts)
    for name, count in out[0]:
        check([each[name, count] for each in out], name, pp, count)


def evaluate_on_rank(rank: int, pp: int):
    found = {}
    for name in SCHEDULES:
        executor, parts, local = pipeline(name, pp)
        # Any tensor may come out, and running again must find nothing left over.
        found[name] = [
            executor.run(batches(4), lambda part, hidden, ahead, batch: hidden + ahead, train=False) for _ in range(2)
        ][1]
        assert not local.backwards and all(p.grad is None for part in parts.values() for p in part.parameters())
    return found


def test_forward_only_runs_give_values_in_order_and_no_gradients():
    out = run_ranks(evaluate_on_rank, 2, 2)
    for name in SCHEDULES:
        parts = [Part(stage, num_stages(name, 2)) for stage in range(num_stages(name, 2))]
        values = next(each[name] for each in out if each[name])
        assert len(values) == 4
        for value, batch in zip(values, batches(4), strict=True):
            carried: list[torch.Tensor] = []
            for part in parts:
                carried = part(carried, batch, lambda part, hidden, ahead, batch: hidden + ahead)
            torch.testing.assert_close(value, carried[0].detach())


def test_activations_die_with_their_backward():
    executor, _, _ = pipeline("1f1b", 1)
    seen: list[weakref.ref] = []

    def watch(part, hidden, ahead, batch):
        assert not any(held() is not None for held in seen)
        seen.append(weakref.ref(hidden))
        return loss(part, hidden, ahead, batch)

    executor.run(batches(4), watch, train=True)
    assert len(seen) == 4 and seen[-1]() is None


def count_unreleased(rank: int, count: int):
    executor, _, _ = pipeline("1f1b", 2)
    waiting = []

    def watch(*given):
        waiting.append(sum(len(sent) for sent in executor._mailbox._sent.values()))

    executor.parts.before_backward = watch
    executor.run(batches(count), loss, train=True)
    return max(waiting)


def test_sent_tensors_are_let_go_while_the_run_goes_on():
    """Rank 0 has two activations on their way at most, rank 1 the gradients of as many."""
    assert max(run_ranks(count_unreleased, 2, 12)) <= 2


def lose_a_rank(rank: int, gone: Path):
    executor, _, _ = pipeline("1f1b", 2)
    if rank == 1:
        torch.distributed.destroy_process_group()
        gone.touch()
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        return None
    while not gone.exists():
        time.sleep(0.1)
    with pytest.raises(CollectiveFailed) as failure:
        executor.run(batches(2), loss, train=True)
    with pytest.raises(AssertionError, match="build the engine anew"):
        executor.run(batches(2), loss, train=True)
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return str(failure.value)


def test_a_lost_neighbour_is_named_by_message(tmp_path):
    message = run_ranks(lose_a_rank, 2, tmp_path / "gone")[0]
    assert "along pp" in message and "micro-batch 0" in message

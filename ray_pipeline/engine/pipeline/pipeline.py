"""Runs a schedule on one pipeline rank: activations go to the next stage, their gradients come back.

It knows neither what a model part computes nor what travels, only how many tensors of which shapes: `ModelParts`
knows the rest. Tokens do not travel: every stage reads the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from model.kernels.weight_gradients import BackwardSplit, WeightGradients
from model.parallel.mesh import Mesh
from model.parallel.placement import parts_of, ranks_of
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.pipeline.messages_between import Mailbox, connect
from ray_pipeline.engine.pipeline.schedule import Action, Schedule, build_schedule, forward_only
from ray_pipeline.engine.spans import WAIT, Span, no_span

OutputFunction = Callable[[Transformer, Tensor, Tensor | None, Batch], Tensor]
"""(last stage, hidden after the final norm, embeddings or None, micro-batch) -> what the last stage computes of it."""


class ModelParts(Protocol):
    """What the pipeline asks of the parts of a model that a rank has."""

    def run(self, index: int, carried: list[Tensor], batch: Batch, output: OutputFunction) -> list[Tensor]:
        """Forward of the local part `index`, autocast included: carried tensors, or of the last stage [`output`'s
        value], which in training is a scalar loss."""
        ...

    def carried_shapes(self, batch: Batch) -> list[tuple[int, ...]]:
        """Shapes of the fp32 tensors between two stages, for a micro-batch; the same between all stages."""
        ...

    def before_backward(self) -> None:
        """Called before every backward."""
        ...


@dataclass
class _Alive:
    """What a backward needs: its inputs, which collect gradients, and the graph above them, not the outputs' values."""

    inputs: list[Tensor]
    outputs: list[GradientEdge | None]


@dataclass
class _Run:
    """State of one run of a schedule."""

    schedule: Schedule
    mailbox: Mailbox
    micro_batches: Sequence[Batch]
    output: OutputFunction
    train: bool
    alive: dict[tuple[int, int], _Alive] = field(default_factory=dict)
    deferred: dict[tuple[int, int], WeightGradients] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)


class Pipeline:
    """The pipeline rank's parts of a model, run forward and backward over micro-batches in a schedule's order.

    Args:
        schedule_name: `model.parallel.placement` and `schedule` know it. parts: this rank's, in the schedule's order.
        split: what the parts' layers have, where the schedule cuts backwards in two.
    """

    def __init__(
        self,
        mesh: Mesh,
        schedule_name: str,
        device: torch.device,
        parts: ModelParts,
        split: BackwardSplit | None = None,
    ):
        self.mesh, self.schedule_name, self.device, self.parts = mesh, schedule_name, device, parts
        self.split = split
        self.span: Span = no_span  # around each action, and around waiting for messages
        self.stages = parts_of(schedule_name, mesh.sizes.pp, mesh.pp_rank)
        # Kept when a run fails: a receive still in progress writes into its tensor.
        self._mailbox: Mailbox | None = None
        connect(mesh, ranks_of(schedule_name, mesh.sizes.pp), device)

    def run(self, micro_batches: Sequence[Batch], output: OutputFunction, *, train: bool) -> list[Tensor]:
        """Forward of every micro-batch and, with `train`, backward; gradients accumulate in the parameters' `.grad`.

        Returns:
            `output`'s values, detached, in the micro-batches' order, on the rank with the last stage; elsewhere [].
        Raises:
            CollectiveFailed: a message that did not arrive; says which.
        """
        assert self._mailbox is None, "an earlier run failed with messages on their way; build the engine anew"
        build = build_schedule if train else forward_only
        schedule = build(self.schedule_name, self.mesh.sizes.pp, len(micro_batches))
        shapes = [self.parts.carried_shapes(batch) for batch in micro_batches]
        mailbox = self._mailbox = Mailbox(schedule, self.mesh, self.device, shapes)
        run = _Run(schedule, mailbox, micro_batches, output, train)
        needs = [schedule.needs(action) for action in schedule.actions[self.mesh.pp_rank]]
        for index, action in enumerate(schedule.actions[self.mesh.pp_rank]):
            message = needs[index]
            with self.span(WAIT):
                received = [] if message is None else mailbox.take(message)
            # What is needed next travels while this action computes.
            upcoming = next((later for later in needs[index + 1 :] if later is not None), None)
            if upcoming is not None:
                mailbox.expect(upcoming)
            with self.span(action.kind):
                self._perform(run, action, received)
        with self.span(WAIT):
            mailbox.finish()
        self._mailbox = None
        return [run.results[index] for index in sorted(run.results)]

    def _perform(self, run: _Run, action: Action, received: list[Tensor]) -> None:
        if action.kind == "W":
            run.deferred.pop((action.stage, action.micro_batch)).run()
            return
        made = self._forward(run, action, received) if action.kind == "F" else self._backward(run, action, received)
        message = run.schedule.makes(action)
        if message is not None:
            run.mailbox.send(message, made)

    def _forward(self, run: _Run, action: Action, carried: list[Tensor]) -> list[Tensor]:
        """Outputs for the next stage, without their graph."""
        batch, last = run.micro_batches[action.micro_batch], action.stage == run.schedule.stages - 1
        for tensor in carried:
            tensor.requires_grad_(run.train)
        with torch.set_grad_enabled(run.train):
            outputs = self.parts.run(self.stages.index(action.stage), carried, batch, run.output)
        if last:
            run.results[action.micro_batch] = outputs[0].detach()
        else:
            shapes = run.mailbox.shapes[action.micro_batch]
            made = [tuple(t.shape) for t in outputs]
            assert made == [tuple(shape) for shape in shapes], f"{action} made {made}, announced were {shapes}"
            assert all(t.dtype == torch.float32 for t in outputs), f"{action}: fp32 travels between stages"
        if run.train:
            # A loss without a graph is a mistake, a carried tensor without one is not.
            edges = [get_gradient_edge(t) if last or t.requires_grad else None for t in outputs]
            run.alive[action.stage, action.micro_batch] = _Alive(carried, edges)
        return [tensor.detach() for tensor in outputs]

    def _backward(self, run: _Run, action: Action, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of the inputs for the previous stage."""
        alive = run.alive.pop((action.stage, action.micro_batch))
        self.parts.before_backward()
        if action.kind == "I":
            assert self.split is not None
            with self.split.deferred() as run.deferred[action.stage, action.micro_batch]:
                _backpropagate(alive.outputs, gradients)
        else:
            _backpropagate(alive.outputs, gradients)
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in alive.inputs]


def _backpropagate(outputs: list[GradientEdge | None], gradients: list[Tensor]) -> None:
    """Backward from a scalar loss (no `gradients`), or from carried tensors with theirs."""
    edges = [edge for edge in outputs if edge is not None]
    if not gradients:
        torch.autograd.backward(edges)
    elif edges:
        torch.autograd.backward(edges, [g for edge, g in zip(outputs, gradients, strict=True) if edge is not None])

"""Runs a schedule on one pipeline stage: activations go to the next stage, their gradients come back.

What travels is (hidden states, embeddings): the embeddings ride along for the MTP modules on the last stage, so no
weight is tied across stages. Tokens do not travel: every stage reads the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.mesh import Mesh
from model.transformer import Transformer
from ray_pipeline.data.batch import Batch
from ray_pipeline.engine.schedule import Action

Finish = Callable[[Transformer, Tensor, Tensor | None, Batch], Tensor]
"""(last stage, hidden after the final norm, embeddings or None, micro-batch) -> what the last stage makes of it."""


class PipelineStage:
    """One stage's forward and backward over micro-batches, with the exchanges between stages."""

    def __init__(self, model: Transformer, mesh: Mesh, *, autocast_dtype: torch.dtype | None = None):
        self.model, self.mesh, self.autocast_dtype = model, mesh, autocast_dtype
        ranks, index = mesh.ranks("pp"), mesh.pp_rank
        self.previous = ranks[index - 1] if index > 0 else None
        self.next = ranks[index + 1] if index + 1 < len(ranks) else None
        # Two tensors travel when the last stage predicts several tokens ahead, else one.
        self.num_carried = 2 if model.config.num_nextn_predict_layers else 1
        self.device = next(model.parameters()).device

    def run(self, schedule: Sequence[Action], micro_batches: Sequence[Batch], finish: Finish) -> list[Tensor]:
        """Execute the schedule; gradients accumulate in the parameters' `.grad`.

        Args:
            finish: on the last stage, gives a scalar loss per micro-batch when the schedule has backwards, and any
                tensor otherwise.
        Returns:
            On the last stage, `finish`'s values, detached, per micro-batch; elsewhere an empty list.
        """
        train = any(not action.forward for action in schedule)
        alive: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        results: list[Tensor] = []
        shapes = [(*batch.tokens.shape, self.model.config.hidden_size) for batch in micro_batches]
        incoming = self._exchange([], None, *self._expected(schedule[0], shapes))
        for action, upcoming in zip(schedule, [*schedule[1:], None], strict=True):
            if action.forward:
                outputs = self._forward(incoming, micro_batches[action.micro_batch], finish, train)
                if self.next is None:
                    results.append(outputs[0].detach())
                if train:
                    alive[action.micro_batch] = (incoming, outputs)
                sent, peer = [t.detach() for t in outputs], self.next
            else:
                inputs, outputs = alive.pop(action.micro_batch)
                torch.autograd.backward(outputs, incoming if self.next is not None else None)
                sent, peer = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs], self.previous
            incoming = self._exchange(sent, peer, *self._expected(upcoming, shapes))
        return results

    def _forward(self, carried: list[Tensor], batch: Batch, finish: Finish, train: bool) -> list[Tensor]:
        model = self.model
        for tensor in carried:
            tensor.requires_grad_(train)
        enabled = self.autocast_dtype is not None
        with torch.set_grad_enabled(train), torch.autocast(self.device.type, self.autocast_dtype, enabled=enabled):
            rotation, mask = model.context(batch.doc_ids, batch.tokens.shape[1])
            hidden = model.embed_tokens(batch.tokens) if model.is_first else carried[0]
            ahead = (hidden if model.is_first else carried[1]) if self.num_carried == 2 else None
            hidden = model.run_layers(hidden, rotation, mask)
            if model.is_last:
                return [finish(model, model.norm(hidden), ahead, batch)]
        return [hidden] if ahead is None else [hidden, ahead]

    def _expected(self, action: Action | None, shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], int | None]:
        """Empty tensors for what `action` needs from a neighbour, and the neighbour."""
        peer = None if action is None else self.previous if action.forward else self.next
        if action is None or peer is None:
            return [], None
        shape = shapes[action.micro_batch]
        return [torch.empty(shape, device=self.device) for _ in range(self.num_carried)], peer

    def _exchange(self, sent: list[Tensor], to: int | None, received: list[Tensor], source: int | None) -> list[Tensor]:
        """Send and receive. Both directions of one pair go as one batch, so that neither side can block the other."""
        group = self.mesh.group("pp")
        sends = [dist.P2POp(dist.isend, t.contiguous(), to, group) for t in sent] if to is not None else []
        receives = [dist.P2POp(dist.irecv, t, source, group) for t in received]
        batches = [sends + receives] if to == source else [sends, receives]
        for operations in batches:
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
        return received

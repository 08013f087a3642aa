"""Decoding over the shards of a model that is laid out for training: weights are read where they are, none is copied.

The ranks of one replica decode together: each tensor-parallel rank computes its heads, each pipeline rank its layers.
They are called alike with the same requests, see the same logits and so write the same tokens. Routed experts that are
cut over replicas are asked as in training: rows travel to them and back. Every rank of an expert-parallel group takes
part in that, so replicas of one group run through the layers at the same time, each with rows of its own; one that has
written all of its answers goes on without rows until the others have (`idle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.build import point_at
from model.generate.cache import KVCache
from model.generate.decoder import Decoder, DecoderLayer, LayerRun
from model.layers.norm import prepared
from model.moe.experts import MixtureOfExperts
from model.moe.replay import columns, layer_columns
from model.parallel.collectives import all_reduce, collective, gather_last
from model.parallel.mesh import Mesh
from model.parallel.placement import parts_of, ranks_of
from model.transformer import Block, Transformer


class LayerInPlace(DecoderLayer):
    """One block for one new token a row, by the block's own weights and, behind attention, its own modules."""

    in_place = True

    def feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block.mlp(self.post_norm(x))
        return out


class ShardedDecoder(Decoder):
    """The part of a replica's decoding that is this rank's.

    Args:
        parts: this rank's, in the schedule's order, from `model.build.part_over`.
        tensors: gives this rank's slices by name in the whole model. All ranks ask for them when they begin to answer
            and let go of them when they have (`idle`).
    """

    kind = LayerInPlace

    def __init__(
        self,
        parts: Sequence[Transformer],
        tensors: Callable[[], Mapping[str, Tensor]],
        mesh: Mesh,
        schedule: str = "1f1b",
    ):
        self.tensors, self._answers = tensors, False
        self._nothing = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
        self.pp, self.ep = mesh.axis("pp"), mesh.axis("ep")
        self.owners = ranks_of(schedule, self.pp.size)  # pipeline rank of every stage
        self.parts = dict(zip(parts_of(schedule, self.pp.size, self.pp.index), parts, strict=True))
        self.model, self.config = parts[0], parts[0].config
        self.last = next((part for part in parts if part.is_last), None)
        self.refresh()

    @property
    def device(self) -> torch.device:
        return self.model.rotary.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _point_at(self, tensors: Mapping[str, Tensor], *, answers: bool) -> None:
        self._answers = answers
        for part in self.parts.values():
            point_at(part, tensors)
        self.refresh()

    def _begin(self) -> None:
        """Read the weights as they are now, unless that has been done since the last `idle`."""
        if not self._answers:
            self._point_at(self.tensors(), answers=True)

    def prefill(
        self, prompts: list[list[int]], capacity: int, watch: Callable[[Tensor, slice], None] | None = None
    ) -> tuple[Tensor, KVCache]:
        self._begin()
        return super().prefill(prompts, capacity, watch)

    @torch.inference_mode()
    def refresh(self) -> None:
        self.layers_of = {
            stage: [LayerInPlace(block) for block in part.layers.values() if isinstance(block, Block)]
            for stage, part in self.parts.items()
        }
        self.layers = [layer for layers in self.layers_of.values() for layer in layers]
        self.norm = nn.Identity() if self.last is None else prepared(self.last.norm)
        self._draft_layers = None

    @property
    def routing_columns(self) -> list[int]:
        mine = [layer for part in self.parts.values() for layer in part.layer_range]
        every = range(columns(self.config))
        passes = layer_columns(self.config, mine)
        return [column for places in passes for place in places if place is not None for column in every[place]]

    def joined_routing(self, ids: Tensor) -> Tensor:
        return all_reduce(ids.int(), self.pp, dist.ReduceOp.MAX)  # FREE, below all ids, where another rank's layers are

    def embed(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.model.embed_tokens(tokens)
        return out

    def normed(self, hidden: Tensor) -> Tensor:
        return hidden if self.last is None else self.last.norm(hidden)

    def logits(self, normed: Tensor) -> Tensor:
        """Of the whole vocabulary, the same on every rank of the replica: [rows, vocab_size]."""
        if self.last is None:
            logits = normed.new_empty(len(normed), self.config.vocab_size)
        else:
            logits = gather_last(self.last.lm_head(normed), self.last.lm_head.tp)
        if self.pp.size > 1:
            with collective(self.pp, "broadcast"):
                dist.broadcast(logits, self.pp.ranks[self.owners[-1]], group=self.pp.group)
        return logits

    def logits_of_prompts(self, hidden: Tensor) -> Tensor:
        return self.logits(self.normed(hidden))

    def through(self, tokens: Tensor, cache: list[Tensor], run: LayerRun) -> Tensor:
        """As `Decoder.through`; behind the last layer only where that is, elsewhere of the same shape."""
        self._any_runs(mine=True)
        if self.pp.size == 1 and len(self.parts) == 1:
            return super().through(tokens, cache, run)
        caches, carried = iter(cache), torch.empty(0)
        for stage, owner in enumerate(self.owners):
            if owner == self.pp.index:
                carried = self._stage(stage, tokens, carried, caches, run)
            if stage + 1 < len(self.owners):
                carried = self._hand_on(carried, tokens, owner, self.owners[stage + 1])
        return carried[0]

    def _stage(self, stage: int, tokens: Tensor, carried: Tensor, caches: Iterator[Tensor], run: LayerRun) -> Tensor:
        """My part of the layers: [1, ..., hidden_size] -> same; where layers read them, embeddings stand behind."""
        if stage == 0:
            carried = self.embed(tokens).unsqueeze(0)
            carried = carried.repeat(2, *[1] * (carried.dim() - 1)) if self.config.residual_scales else carried
        x, start = carried[0], carried[-1]
        for layer in self.layers_of[stage]:
            x = run(layer, layer.read(x, start), next(caches))
        return torch.stack([x, start]) if self.config.residual_scales else x.unsqueeze(0)

    def _hand_on(self, carried: Tensor, tokens: Tensor, source: int, target: int) -> Tensor:
        """From a pipeline rank to the next; what the others have stays."""
        if source == target:
            return carried
        if self.pp.index == source:
            with collective(self.pp, "send"):
                dist.send(carried.contiguous(), self.pp.ranks[target], group=self.pp.group)
        elif self.pp.index == target:
            shape = (1 + self.config.residual_scales, *tokens.shape, self.config.hidden_size)
            carried = torch.empty(shape, dtype=self.dtype, device=self.device)
            with collective(self.pp, "receive"):
                dist.recv(carried, self.pp.ranks[source], group=self.pp.group)
        return carried

    def _any_runs(self, *, mine: bool) -> bool:
        """Whether a rank of the expert-parallel group is about to run through the layers; all of them ask each time."""
        if self.ep.size == 1:
            return mine
        flag = torch.tensor([float(mine)], device=self.device)
        return bool(all_reduce(flag, self.ep, dist.ReduceOp.MAX).item())

    @torch.inference_mode()
    def idle(self) -> None:
        """Compute for the other ranks of the expert-parallel group, without a row of one's own, until all of them call
        this. Every rank does when it has nothing left to decode. The weights are let go of then."""
        self._begin()
        k, width = self.config.num_experts_per_tok, self.config.hidden_size
        x, weights = (torch.empty(0, n, dtype=self.dtype, device=self.device) for n in (width, k))
        indices = torch.empty(0, k, dtype=torch.long, device=self.device)
        routed = [layer.block.mlp for layer in self.layers if isinstance(layer.block.mlp, MixtureOfExperts)]
        while self._any_runs(mine=False):
            for mlp in routed * self.config.recursion_depth:
                mlp.experts(x, indices, weights)
        self._point_at(self._nothing, answers=False)

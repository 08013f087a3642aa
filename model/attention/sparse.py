"""DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv:2512.02556, §2.1): MLA over the tokens that an indexer chooses.

Two phases of training (§2.1.1). In the dense warm-up attention reads everything and the indexer learns from it; then
it reads `index_topk` tokens, and the indexer learns from those. V3.2 froze the main model in the warm-up because it
was trained already; from scratch it trains along. The indexer's input is detached: it learns from its own loss alone,
and the main model from the language model's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention.core import softmax_attention
from model.attention.index_loss import Index, indexer_kl
from model.attention.indexer import Indexer, select
from model.attention.mla import MultiHeadLatentAttention
from model.config import ModelConfig
from model.layers.auxiliary import EVERY_TOKEN, Counting
from model.parallel.collectives import heads_for_positions, positions_for_heads, reduce_from


class SparseAttention(MultiHeadLatentAttention):
    """[batch, seq, hidden_size] -> same; equal to MLA on rows of up to `index_topk` tokens.

    Training and prefill compute attention with a mask over whole rows: below some seven times `index_topk` tokens that
    is less arithmetic than gathering latents would be. Decoding gathers (`model.generate.sparse_step`).

    Attributes:
        warming_up: in training mode, attend to everything. Evaluation always reads what the indexer chooses, because
            that is how the trained model is used.
    """

    warming_up = False

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.indexer = Indexer(config)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, counting: Counting = EVERY_TOKEN,
        values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend within documents; arguments as MLA's. The indexer learns from the queries that count."""
        query_latent = self.query_latent(x)
        q, k, v = self.heads(query_latent, x, rotation, values)
        seq = q.shape[1]
        dense = seq <= self.config.index_topk or (self.warming_up and self.training)
        if not dense or counting.wants_losses:
            index = self.indexer(x.detach(), query_latent.detach(), rotation)
            read = _causal(seq, x.device) if mask is None else mask[:, 0]
            if not dense:
                read = self._selected(index, read)
                mask = read.unsqueeze(1)
        heads_first = (part.transpose(1, 2) for part in (q, k, v))
        out = softmax_attention(*heads_first, scale=self.scale, mask=mask, documents=dense)
        out = positions_for_heads(out.transpose(1, 2), self.sp)
        out = reduce_from(self.o_proj(out.flatten(2)), self.tp)
        if not counting.wants_losses:
            return out
        loss = indexer_kl(
            index, q.detach(), k.detach(), read, self.scale, tp=self.tp, sp=self.sp, counted=counting.real
        )
        return counting.add_loss(out, loss, "indexer_kl")

    def _selected(self, index: Index, visible: Tensor) -> Tensor:
        """What every query of whole rows reads: bool [batch, seq, seq]."""
        q, k, weights = index
        first, window = self.sp.index * q.shape[1], q.shape[1]
        mine = select(q, k, weights, visible[:, first : first + window], self.config.index_topk, first)
        if self.sp.size == 1:
            return mine
        # The same rows for every rank, in the place of heads.
        each = mine.to(torch.uint8).unsqueeze(2).expand(-1, -1, self.sp.size, -1)
        return heads_for_positions(each, self.sp).squeeze(2).bool()


def _causal(seq: int, device: torch.device) -> Tensor:
    return torch.ones(1, seq, seq, dtype=torch.bool, device=device).tril()


def set_warm_up(model: nn.Module, on: bool) -> None:
    """Whether training steps from now on are the indexer's dense warm-up; nothing happens without an indexer."""
    for module in model.modules():
        if isinstance(module, SparseAttention):
            module.warming_up = on

"""DeepSeek Sparse Attention for one new token a row (DeepSeek-V3.2, arXiv:2512.02556, §2.1).

The cache holds an index key beside MLA's latent and rotary key. A step scores all index keys, which are narrow, and
then reads the latents of the `index_topk` tokens it chose: attention's work no longer grows with the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.indexer import highest, index_scores
from model.attention.sparse import SparseAttention
from model.generate.absorbed import AbsorbedAttention
from model.kernels.cpu.products import factor


class SparseStep(AbsorbedAttention):
    """One layer's sparse attention for one new token a row."""

    def __init__(self, attention: SparseAttention, adds_values: bool = False, *, in_place: bool = False):
        super().__init__(attention, adds_values, in_place=in_place)
        self.indexer, self.topk = attention.indexer, attention.config.index_topk
        self.latent_width = self.width
        self.width += attention.config.index_head_dim
        self.index_query = factor(self.indexer.wq_b.weight, in_place=in_place)

    def remember(self, y: Tensor, rotation: Tensor, into: Tensor, values: Tensor | None = None) -> None:
        """As of MLA, and index keys behind them: y [rows, n, hidden_size] into [rows, n, width]."""
        super().remember(y, rotation, into[:, :, : self.latent_width], values)
        into[:, :, self.latent_width :] = self.indexer.keys(y, rotation)

    def step(
        self, x: Tensor, residual: Tensor, rotation: Tensor, cache: Tensor, bias: Tensor, column: int,
        values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend to at most `index_topk` of the columns up to `column`, which is written first.

        Args:
            x: [rows, hidden_size], normalised; residual: same, added to the result.
            rotation: complex [rows, 1, qk_rope_head_dim / 2].
            cache: this layer's [rows, capacity, width]; bias: [rows, 1, column + 1].
            values: [rows, heads, v_head_dim], added to the new token's.
        """
        down, new = self.down.product(x), cache[:, column : column + 1]
        self._write(new[:, :, : self.latent_width], down[:, None, self.first_width :], rotation, values)
        new[:, :, self.latent_width :] = self.indexer.keys(x.unsqueeze(1), rotation)
        seen, first = cache[:, : column + 1], down[:, : self.first_width]
        if column >= self.topk:
            chosen = self._chosen(x, first, rotation, seen, bias)
            seen = seen[torch.arange(len(x), device=x.device)[:, None], chosen]
            bias = bias.gather(2, chosen.unsqueeze(1))
        seen = seen[:, :, : self.latent_width]
        q = self.in_latent_space(self.queries(first), rotation)
        return self.attend(torch.baddbmm(bias, q, seen[:, :, : self.keys].transpose(1, 2)), seen, residual)

    def _chosen(self, x: Tensor, first: Tensor, rotation: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        """Columns the new token reads, in any order: [rows, index_topk]; a short row fills up with its padding."""
        indexer = self.indexer
        assert self.query_norm is not None
        query_latent = self.query_norm(first)
        q = self.index_query.product(query_latent).view(len(x), 1, indexer.heads, indexer.dim)
        q, weights = indexer.rotate(q, rotation), indexer.weights(x).unsqueeze(1)
        scores = index_scores(q, seen[:, :, self.latent_width :], weights) + bias
        chosen = highest(scores, self.topk).squeeze(1)
        return chosen.int().topk(self.topk, sorted=False).indices  # unlike `nonzero`, without waiting for a GPU

"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, §2.2): one more block per depth, embedding and head shared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.auxiliary import EVERY_TOKEN, Counting
from model.layers.linear import Linear
from model.layers.norm import build_norm


class MultiTokenPredictor(nn.Module):
    """h'_t = norm(block(M [RMSNorm(emb(token_{t+k})); RMSNorm(h_t)])) (eqs. 21-23)."""

    def __init__(self, config: ModelConfig, block: nn.Module):
        super().__init__()
        self.enorm = build_norm(config)
        self.hnorm = build_norm(config)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = block
        self.shared_head_norm = build_norm(config)

    def forward(
        self,
        hidden: Tensor,
        embeddings: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        counting: Counting = EVERY_TOKEN,
    ) -> Tensor:
        """hidden and embeddings (already shifted), both [batch, seq, hidden_size] -> [batch, seq, hidden_size].

        `counting` as the block takes it.
        """
        return self.shared_head_norm(self.block(self.join(hidden, embeddings), rotation, mask, None, counting))

    def join(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """What the block reads (eq. 21): both [..., hidden_size] -> same."""
        return self.eh_proj(torch.cat([self.enorm(embeddings), self.hnorm(hidden)], -1))

"""Which experts a token goes to (DeepSeek-V3, arXiv:2412.19437, §2.1.2), balanced without an auxiliary loss.

A bias per expert is added to the scores for the choice alone; after each step it rises for experts that got fewer
tokens than the mean and falls for the others (arXiv:2408.15664). The mixing weights never see the bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class Router(nn.Module):
    """Group-limited top-k of sigmoid scores."""

    e_score_correction_bias: Tensor
    load: Tensor
    counting: bool = True  # off while a checkpointed block runs again

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        # Tokens each expert got since the last balancing step; not part of the model.
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for x [tokens, hidden_size].

        Returns:
            indices [tokens, num_experts_per_tok] int64, and weights of the same shape in fp32 (eqs. 12-16).
        """
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        indices = self._choose(scores.detach())
        weights = scores.gather(1, indices)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training and self.counting and torch.is_grad_enabled():
            self.load += torch.bincount(indices.flatten(), minlength=config.n_routed_experts)
        return indices, weights * config.routed_scaling_factor

    def _choose(self, scores: Tensor) -> Tensor:
        config = self.config
        choice = scores + self.e_score_correction_bias
        if config.n_group > 1:
            grouped = choice.unflatten(1, (config.n_group, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
        return choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def balance(self) -> None:
        """Move the bias one step against the load, which must already be summed over data-parallel ranks."""
        self.e_score_correction_bias += self.config.router_bias_update_rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()

"""Which experts a token goes to, and what keeps them evenly used.

DeepSeek-V3 (arXiv:2412.19437, §2.1.2) scores with a sigmoid and balances without a loss: a bias per expert is added
to the scores for the choice alone; after each step it rises for experts that got fewer tokens than the mean and falls
for the others (arXiv:2408.15664). The mixing weights never see the bias. DeepSeek-V2 (arXiv:2405.04434, §2.2) scores
with a softmax, limits the groups of experts a token is sent to, and balances with a loss (`model.moe.balance`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.weight_gradients import BackwardSplit
from model.layers.auxiliary import EVERY_TOKEN, Counting
from model.layers.linear import linear, without_autocast
from model.moe.balance import batch_loss, sequence_loss
from model.moe.replay import FREE
from model.parallel.collectives import LOCAL, Axis

FEW = 16  # tokens or experts: of fewer, topk is quicker than numpy; else it takes up to three times as long (measured)


def _largest(scores: Tensor, k: int) -> Tensor:
    """Where each row's k largest are, in no order: [tokens, experts] -> [tokens, k]."""
    if scores.device.type != "cpu" or min(scores.shape) < FEW:
        return scores.topk(k, dim=-1, sorted=False).indices
    first = scores.shape[1] - k
    order = scores.numpy().argpartition(first, axis=1)
    return torch.from_numpy(order[:, first:]).contiguous()


class Router(nn.Module):
    """Top-k of sigmoid or softmax scores.

    `topk_method` noaux_tc adds the balancing bias and keeps the `topk_group` groups whose best two experts score
    highest together; group_limited_greedy keeps those with the highest single score; greedy takes no notice of groups.

    Attributes:
        e_score_correction_bias: of noaux_tc.
        expert_fraction: with a loss over the whole batch, the share of choices each expert got in the step before;
            zeros before the first. Training state: checkpoints have it, a saved model has not.
        load: tokens each expert got since the last optimizer step, once per pass, padding left out; not part of the
            model.
        backward_split: lets the weight gradient be computed later.
    """

    e_score_correction_bias: Tensor
    expert_fraction: Tensor
    load: Tensor
    sp: Axis = LOCAL
    backward_split: BackwardSplit | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)
        if self.has_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        if self.remembers_load:
            self.register_buffer("expert_fraction", torch.zeros(experts), persistent=False)

    @property
    def has_bias(self) -> bool:
        """Whether a bias, moved after every step, takes part in the choice."""
        return self.config.topk_method == "noaux_tc"

    @property
    def remembers_load(self) -> bool:
        """Whether the balancing loss is over the whole batch."""
        return self.config.aux_loss_alpha > 0 and not self.config.seq_aux

    def forward(
        self, x: Tensor, rows: int = 1, given: Tensor | None = None, counting: Counting = EVERY_TOKEN
    ) -> tuple[Tensor, Tensor]:
        """Choose experts for x [tokens, hidden_size].

        Args:
            rows: sequences that the tokens belong to, one after another, of equal length.
            given: [tokens, num_experts_per_tok] experts to use in place of a choice, with the weights that their
                scores have now; a token whose ids are FREE chooses by itself.
            counting: which tokens the load and the balancing loss are of; the others are padding, which is routed and
                otherwise nothing.
        Returns:
            indices [tokens, num_experts_per_tok] int64, and weights of the same shape in fp32 (V3, eqs. 12-16).
        """
        config = self.config
        counted = None if counting.real is None else counting.real.flatten()
        with without_autocast(x):
            logits = linear(x.float(), self.weight.float(), self.backward_split)
            scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
            indices = self._choose(scores.detach())
            if given is not None:
                indices = torch.where(given[:, :1] == FREE, indices, given)
            weights = scores.gather(1, indices)
            if config.norm_topk_prob:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            if config.routed_scaling_factor != 1:
                weights = weights * config.routed_scaling_factor
            if config.aux_loss_alpha > 0 and counting.wants_losses:
                loss = self._loss(scores, indices, rows, counted)
                weights = counting.add_loss(weights, loss, "aux_loss", weight=config.aux_loss_alpha)
        if self.training and not counting.repeated and torch.is_grad_enabled():
            self._count(indices, counted)
        return indices, weights

    def _count(self, indices: Tensor, counted: Tensor | None) -> None:
        if counted is None:
            self.load += torch.bincount(indices.flatten(), minlength=self.config.n_routed_experts)
        else:
            each = counted.to(self.load.dtype).unsqueeze(1).expand_as(indices)
            self.load.scatter_add_(0, indices.flatten(), each.flatten())

    def _choose(self, scores: Tensor) -> Tensor:
        """[tokens, experts] -> [tokens, num_experts_per_tok]."""
        config = self.config
        choice = scores + self.e_score_correction_bias if self.has_bias else scores
        if config.n_group > 1 and config.topk_method != "greedy":
            grouped = choice.unflatten(1, (config.n_group, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1) if self.has_bias else grouped.amax(-1)
            kept = best.topk(config.topk_group, dim=-1, sorted=False).indices
            allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True)
            choice = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
        return _largest(choice, config.num_experts_per_tok)

    def _loss(self, scores: Tensor, indices: Tensor, rows: int, counted: Tensor | None) -> Tensor:
        """The balancing loss of the tokens that count, a sum over them, unweighted."""
        if self.remembers_load:
            return batch_loss(scores, self.expert_fraction, counted)
        if self.has_bias:  # V3's eq. 18 counts what the scores alone would choose, not what the bias made of it
            indices = _largest(scores.detach(), indices.shape[1])
        return sequence_loss(scores, indices, rows, self.sp, counted)

    @torch.no_grad()
    def balance(self) -> None:
        """Take note of the load, which must already be summed over data-parallel ranks, and start counting anew.

        The bias moves one step against it, unless the router is frozen.
        """
        load = self.load.float()
        if self.has_bias and self.weight.requires_grad:
            self.e_score_correction_bias += self.config.router_bias_update_rate * torch.sign(load.mean() - load)
        if self.remembers_load:  # a module that did not run (MTP in some objectives) keeps what it knew
            total = load.sum()
            self.expert_fraction.copy_(torch.where(total > 0, load / total.clamp(min=1), self.expert_fraction))
        self.load.zero_()

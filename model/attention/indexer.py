"""The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv:2512.02556, §2.1).

It says which tokens a query reads, and knows nothing of the attention that reads them. DeepSeek's kernels turn queries
and keys by a Hadamard matrix and score them in FP8; the rotation leaves every product as it is and serves the
quantisation alone, so neither is done here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.linear import Linear, without_autocast
from model.parallel.collectives import LOCAL, Axis, heads_for_positions

# Numbers in one block of scores (queries x heads x keys): bounds memory; the result does not depend on it.
BLOCK = 1 << 24


class Indexer(nn.Module):
    """Few narrow heads with one key for all of them; names, shapes and rotary layout are Hugging Face's DeepseekV32's.

    Every tensor-parallel rank has it whole: all must choose the same tokens.
    """

    sp: Axis = LOCAL

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.q_lora_rank is not None, "refused by model.config_rules"
        self.heads, self.dim, self.rotary_dim = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.wk = Linear(config.hidden_size, self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = Linear(config.hidden_size, self.heads)

    def forward(self, x: Tensor, query_latent: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `index_scores` reads.

        Args:
            x: [batch, seq / sp, hidden_size]; query_latent: [batch, seq / sp, q_lora_rank], after its norm.
            rotation: complex [batch or 1, seq / sp, qk_rope_head_dim / 2].
        Returns:
            Queries [batch, seq / sp, index heads, index dim], keys of whole rows [batch, seq, index dim] and the
            heads' weights [batch, seq / sp, index heads], in fp32 as the scores that they make.
        """
        q = self.rotate(self.wq_b(query_latent).unflatten(-1, (self.heads, self.dim)), rotation)
        k = self.keys(x, rotation).to(q.dtype)
        if self.sp.size > 1:  # the same key for every rank, in the place of heads
            k = heads_for_positions(k.unsqueeze(2).expand(-1, -1, self.sp.size, -1), self.sp).squeeze(2)
        return q, k, self.weights(x)

    def keys(self, x: Tensor, rotation: Tensor) -> Tensor:
        """[batch, seq, hidden_size] -> [batch, seq, index dim]."""
        return self.rotate(self.k_norm(self.wk(x)).unsqueeze(2), rotation).squeeze(2)

    def weights(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., index heads], with the scale of products and heads in them."""
        with without_autocast(x):
            weights = self.weights_proj(x.to(self.weights_proj.weight.dtype))
        return weights.float() * (self.dim * self.heads) ** -0.5

    def rotate(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Turn the first `qk_rope_head_dim` features of x [batch, seq, heads, dim].

        Features i and i + qk_rope_head_dim / 2 are a pair here, not neighbours as everywhere else.
        """
        turned, rest = x.split([self.rotary_dim, self.dim - self.rotary_dim], -1)
        real, imaginary = turned.float().chunk(2, -1)
        # Not as complex numbers, as which they do not lie in memory: autograd would keep the copies.
        cos, sin = rotation.real.unsqueeze(2), rotation.imag.unsqueeze(2)
        halves = real * cos - imaginary * sin, real * sin + imaginary * cos
        return torch.cat([*(half.to(x.dtype) for half in halves), rest], -1)


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """I[t, s] = sum over heads of w[t, h] * relu(q[t, h] . k[s]) (eq. 1).

    Args:
        q: [batch, queries, heads, dim]; k: [batch, keys, dim]; weights: [batch, queries, heads].
    Returns:
        fp32 [batch, queries, keys]; products are made in the dtype of q and k.
    """
    with without_autocast(q):
        products = torch.bmm(q.flatten(1, 2), k.transpose(1, 2)).relu().float()
        products = products.unflatten(1, q.shape[1:3]).flatten(0, 1)  # [batch * queries, heads, keys]
        return torch.bmm(weights.flatten(0, 1).unsqueeze(1), products).view(q.shape[0], q.shape[1], -1)


def highest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` highest scores of each row: [..., keys] -> bool, same shape.

    Of equal scores the last ones are taken: relu makes many zeros, and which of them a sort finds first would differ
    between a row alone, padded, and decoded token by token.
    """
    lowest = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > lowest, scores == lowest
    wanted = count - above.sum(-1, keepdim=True)
    from_the_end = equal.sum(-1, keepdim=True) - equal.cumsum(-1) + 1  # 1 for the last of the equal ones
    return above | (equal & (from_the_end <= wanted))


@torch.no_grad()
def select(q: Tensor, k: Tensor, weights: Tensor, visible: Tensor, topk: int, first: int = 0) -> Tensor:
    """The tokens each query reads: the `topk` with the highest scores among the visible ones, or all of these.

    Args:
        q, k, weights: from `Indexer.forward`; the queries are at positions `first` and on of the row.
        visible: bool [batch or 1, queries, keys], no key after its query.
    Returns:
        bool [batch, queries, keys].
    """
    batch, queries, heads, _ = q.shape
    selected = visible.expand(batch, -1, -1).clone()
    rows = max(1, BLOCK // (batch * heads * k.shape[1]))
    start = max(0, topk - first)  # queries before it see no more than topk tokens
    for begin in range(start, queries, rows):
        end = min(begin + rows, queries)
        seen = first + end  # no query of the block looks further
        part = selected[:, begin:end, :seen]
        scores = index_scores(q[:, begin:end], k[:, :seen], weights[:, begin:end]).masked_fill_(~part, -torch.inf)
        part &= highest(scores, topk)
    return selected

"""Attention with keys and values of its own per head or per group of heads, no latent.

Multi-head attention (arXiv:1706.03762, §3.2.2) has as many key and value heads as query heads, grouped-query attention
(arXiv:2305.13245) one for several query heads, multi-query attention (arXiv:1911.02150) one for all. What a query may
see is the mask's matter: the sliding kind differs in nothing else (`model.attention.sliding`).

Query heads and key heads are cut over tp. The one key head of multi-query attention is needed by every rank: like
MLA's latent, each has its projection whole.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.cope import contextual_attention
from model.attention.core import softmax_attention
from model.config import ModelConfig
from model.layers.auxiliary import EVERY_TOKEN, Counting
from model.layers.linear import Linear
from model.layers.rope import apply_rotary, softmax_scale
from model.parallel.collectives import LOCAL, Axis, copy_to, heads_for_positions, positions_for_heads, reduce_from


class GroupedAttention(nn.Module):
    """[batch, seq, hidden_size] -> same. Query head i reads key and value head i // (heads / kv_heads).

    Under sequence parallelism each rank has its positions of a row outside attention, and some heads of all positions
    inside it.
    """

    tp: Axis = LOCAL
    sp: Axis = LOCAL

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * dim)
        if config.attention == "mqa":
            self.kv_proj_with_mqa = Linear(hidden, 2 * dim)  # key, then value
        else:
            self.k_proj = Linear(hidden, config.num_kv_heads * dim)
            self.v_proj = Linear(hidden, config.num_kv_heads * dim)
        self.o_proj = Linear(config.num_attention_heads * dim, hidden)
        self.scale = softmax_scale(config)
        if config.position == "cope":
            self.position_embedding = nn.Parameter(torch.zeros(config.cope_positions, dim))

    def keys_and_values(self, x: Tensor, entered: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Not yet rotated, [batch, seq, kv_heads / tp * head_dim]; of the one head of MQA, all of it.

        Args:
            x: [batch, seq, hidden_size]. entered: the same within the region that is cut over tp.
            values: [batch, seq, kv_heads / tp, head_dim], added to the values.
        """
        if self.config.attention == "mqa":
            both = self.kv_proj_with_mqa(x)
            if values is not None:
                both = both + F.pad(values.flatten(2), (self.config.head_dim, 0))
            k, v = copy_to(both, self.tp).chunk(2, -1)
            return k, v
        v = self.v_proj(entered)
        return self.k_proj(entered), v if values is None else v + values.flatten(2)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, counting: Counting = EVERY_TOKEN,
        values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend within documents.

        Args:
            x: [batch, seq / sp, hidden_size].
            rotation: complex [batch or 1, seq / sp, head_dim / 2]; contextual positions leave it aside.
            mask: bool [batch or 1, 1, seq, seq], or None for plain causal attention.
            counting: of no use here, as there is no loss of this layer alone.
            values: [batch, seq / sp, kv_heads / tp, head_dim], added to the values.
        """
        entered = copy_to(x, self.tp)
        flat = (self.q_proj(entered), *self.keys_and_values(x, entered, values))
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in flat)
        if self.config.position == "rope":
            q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)
        q, k, v = (part.transpose(1, 2) for part in exchange_heads(q, k, v, self.sp))
        if self.config.position == "cope":
            # Each rank has the whole table and uses it for its heads alone.
            table = copy_to(self.position_embedding, self.tp)
            out = contextual_attention(q, k, v, table, scale=self.scale, mask=mask)
        else:
            window = self.config.sliding_window if self.config.attention == "sliding" else None
            out = softmax_attention(q, k, v, scale=self.scale, mask=mask, window=window, documents=window is None)
        out = positions_for_heads(out.transpose(1, 2), self.sp)
        return reduce_from(self.o_proj(out.flatten(2)), self.tp)


def exchange_heads(q: Tensor, k: Tensor, v: Tensor, sp: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Positions for heads in one message: [batch, seq / sp, heads, dim] each -> [batch, seq, heads / sp, dim].

    Fewer key heads than ranks, or a number that the ranks don't divide, are sent as often as makes an even share.
    """
    if sp.size == 1:
        return q, k, v
    copies = sp.size // gcd(sp.size, k.shape[2])
    k, v = k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)
    # In the order of the ranks that get them: queries, keys and values of the first, of the second, ...
    shares = [part.unflatten(2, (sp.size, -1)) for part in (q, k, v)]
    got = heads_for_positions(torch.cat(shares, 3).flatten(2, 3), sp)
    q, k, v = got.split([share.shape[3] for share in shares], 2)
    return q, k, v

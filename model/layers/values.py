"""Value embeddings: in every second layer, a vector of the token's own is added to the values of attention.

v <- v + 3 sigmoid(W_g x[:12]) e[token], one gate a head, as karpathy's nanochat has it; the idea of values that need
not come through the layers is from ResFormer (arXiv:2410.17897), the tables from Keller Jordan's modded-nanogpt. No
published class has them: such a model is exported in this project's own format.

Under tensor parallelism a rank has the columns of its heads, and looks its tokens up without a message; the one value
head of multi-query attention is whole on every rank. Decoding keeps what was added: beside MLA's latent that is
v_head_dim features a head more in the cache of those layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.config_rules import VALUE_GATE_FEATURES
from model.parallel.collectives import LOCAL, Axis, copy_to


class ValueEmbedding(nn.Module):
    """A table [vocab_size, kv_heads * v_dim] and a gate [kv_heads, 12], both cut by heads."""

    tp: Axis = LOCAL

    def __init__(self, config: ModelConfig):
        super().__init__()
        heads = config.num_kv_heads
        self.is_whole = config.attention == "mqa"
        # How a parameter is cut goes by its name.
        end = "_with_mqa" if self.is_whole else ""
        table = torch.empty(config.vocab_size, heads * config.value_head_dim)
        self.register_parameter(f"table{end}", nn.Parameter(table))
        self.register_parameter(f"gate{end}", nn.Parameter(torch.empty(heads, VALUE_GATE_FEATURES)))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """What attention reads [..., hidden_size] and token ids [...] -> [..., kv_heads / tp, v_dim]."""
        table, gate = self.parameters()
        read = x[..., :VALUE_GATE_FEATURES]
        share = 3 * torch.sigmoid(F.linear(read if self.is_whole else copy_to(read, self.tp), gate))
        found = F.embedding(tokens, table).to(share.dtype)
        return share.unsqueeze(-1) * found.unflatten(-1, (share.shape[-1], -1))


def build_value_embedding(config: ModelConfig, layer: int) -> ValueEmbedding | None:
    """None where the values are what attention makes of the stream alone."""
    return ValueEmbedding(config) if config.has_value_embedding(layer) else None

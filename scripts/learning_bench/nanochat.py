"""The GPT of karpathy's nanochat, written anew from its published description: the peer of the race.

https://github.com/karpathy/nanochat, state of July 2026. Rotary positions, normalised queries and keys times 1.2, norms
without weights (one more after the embedding), squared ReLU, an untied head with a soft-capped logit, output
projections that start at zero, value embeddings in every second layer behind a gate, a residual stream with learned
scales and a share of the embedding in every layer, a gate that smears the previous token's embedding in, a fifth of the
middle layer's stream taken out before the head, and windows of a quarter of the row in three layers of four.

Here every mask is dense, and nothing crosses a document: neither attention nor the smeared embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOFT_CAP = 15.0
SHARPER = 1.2  # of normalised queries and of keys
ROTARY_BASE = 100_000.0
GATE_FEATURES, SMEAR_FEATURES = 12, 24  # of the stream, that the gates read
BACKED_OUT = 0.2  # of the middle layer's stream


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the window is nanochat's rule: a quarter of a row, in whole tiles of 128."""

    vocab_size: int
    width: int = 128
    layers: int = 5
    heads: int = 4
    seq_len: int = 256

    def has_values(self, layer: int) -> bool:
        """Whether the layer has value embeddings: every second one, the last among them."""
        return layer % 2 == (self.layers - 1) % 2

    def window(self, layer: int) -> int:
        """Tokens before a query that it reads."""
        short = layer % 4 != 3 and layer != self.layers - 1
        return -(-self.seq_len // 4 // 128) * 128 if short else self.seq_len


def norm(x: Tensor) -> Tensor:
    """x / rms(x), without a weight."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [batch, heads, seq, dim] by its positions: pairs are (i, i + dim / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


class Attention(nn.Module):
    """Causal attention over normalised queries and keys; values take the token's value embedding in, gated a head."""

    def __init__(self, shape: Shape, layer: int):
        super().__init__()
        self.heads, width = shape.heads, shape.width
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate = nn.Linear(GATE_FEATURES, shape.heads, bias=False) if shape.has_values(layer) else None

    def forward(self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [batch, seq, width], mask bool [batch, 1, seq, seq] -> [batch, seq, width]."""
        batch, seq, width = x.shape
        q, k, v = (m(x).view(batch, seq, self.heads, -1) for m in (self.c_q, self.c_k, self.c_v))
        if self.gate is not None and values is not None:
            share = 3 * torch.sigmoid(self.gate(x[..., :GATE_FEATURES]))
            v = v + share.unsqueeze(-1) * values.view_as(v)
        q, k = (SHARPER * norm(rotate(t.transpose(1, 2), cos, sin)) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask)
        return self.c_proj(out.transpose(1, 2).reshape(batch, seq, width))


class Block(nn.Module):
    """Attention and a squared-ReLU feed-forward of four times the width, both behind a norm."""

    def __init__(self, shape: Shape, layer: int):
        super().__init__()
        self.attn = Attention(shape, layer)
        self.c_fc = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.c_proj = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[batch, seq, width] -> same."""
        x = x + self.attn(norm(x), values, cos, sin, mask)
        return x + self.c_proj(F.relu(self.c_fc(norm(x))).square())


class NanochatGPT(nn.Module):
    """Token ids and document ids -> logits."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, seed: int):
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.lm_head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(shape.vocab_size, shape.width) for i in range(shape.layers) if shape.has_values(i)}
        )
        depth = torch.arange(shape.layers) / max(1, shape.layers - 1)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(1.15 - 0.10 * depth), nn.Parameter(0.20 - 0.15 * depth)
        self.smear_gate = nn.Linear(SMEAR_FEATURES, 1, bias=False)
        self.smear_lambda, self.backout_lambda = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.tensor([BACKED_OUT]))
        dim = shape.width // shape.heads
        angle = torch.outer(torch.arange(shape.seq_len), ROTARY_BASE ** -(torch.arange(0, dim, 2) / dim))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.draw(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Initial weights: uniform with the deviation 1 / sqrt(width); projections back into the stream are zero."""
        bound = (3 / self.shape.width) ** 0.5
        self.wte.weight.normal_(0, 0.8, generator=generator)
        self.lm_head.weight.normal_(0, 0.001, generator=generator)
        for block in self.blocks:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                matrix.weight.uniform_(-bound, bound, generator=generator)
            block.c_fc.weight.uniform_(-0.4 * bound, 0.4 * bound, generator=generator)
            block.attn.c_proj.weight.zero_()
            block.c_proj.weight.zero_()
            if block.attn.gate is not None:
                block.attn.gate.weight.uniform_(0, 0.02, generator=generator)
        for table in self.value_embeds.values():
            table.weight.uniform_(-bound, bound, generator=generator)
        self.smear_gate.weight.uniform_(0, 0.02, generator=generator)

    def forward(self, tokens: Tensor, doc_ids: Tensor) -> Tensor:
        """tokens, doc_ids [batch, seq] -> logits [batch, seq, vocab_size]."""
        seq = tokens.shape[1]
        place = torch.arange(seq, device=tokens.device)
        back = place[:, None] - place[None, :]
        same = doc_ids[:, :, None] == doc_ids[:, None, :]
        visible = {w: (same & (back >= 0) & (back <= w))[:, None] for w in (self.shape.seq_len, self.shape.window(0))}
        x = norm(self.wte(tokens))
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_FEATURES]))
        gate = gate * (doc_ids[:, 1:] == doc_ids[:, :-1]).unsqueeze(-1)
        x = start = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], 1)
        middle = x
        for layer, block in enumerate(self.blocks):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * start
            values = self.value_embeds[str(layer)](tokens) if str(layer) in self.value_embeds else None
            x = block(x, values, self.cos[:seq], self.sin[:seq], visible[self.shape.window(layer)])
            if layer == self.shape.layers // 2:
                middle = x
        logits = self.lm_head(norm(x - self.backout_lambda * middle))
        return SOFT_CAP * torch.tanh(logits / SOFT_CAP)

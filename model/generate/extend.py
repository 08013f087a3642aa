"""Several new tokens a row in one pass over the cache: what verifying a draft takes.

Every matrix is read once for all of them, which is where speculative decoding gains. Kinds of attention that choose
what a token reads (contextual positions, windows, top-k), and MLA with value embeddings, attend token by token; their
projections, like all of the rest, are shared only across rows there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.generate.absorbed import AbsorbedAttention, rotate_in_place, write_latent
from model.generate.attention_steps import DecodeAttention
from model.generate.cache import KVCache
from model.generate.decoder import Decoder, DecoderLayer
from model.generate.grouped_step import GroupedStep


@dataclass(frozen=True)
class Span:
    """Where n new tokens of every row are.

    Attributes:
        column: the first one's column in the cache.
        rotation: complex [rows, n, rotary_dim / 2].
        bias: [rows, n, column + n], added to attention scores: -inf over padding and over later tokens.
    """

    column: int
    rotation: Tensor
    bias: Tensor

    @classmethod
    def at(cls, rotary: Tensor, cache: KVCache, column: int, n: int) -> Span:
        """Columns `column` to `column + n` of `cache`, whose rows may begin inside them."""
        device = cache.padding.device
        new = torch.arange(n, device=device)
        positions = column + new - cache.padding[:, None]
        later = torch.arange(column + n, device=device) > column + new[:, None]
        bias = cache.bias[:, :, : column + n].masked_fill(later, -torch.inf)
        # In the padding there is nothing to attend to, and a softmax over nothing would be nan: let it read anything.
        bias = bias.masked_fill(positions[:, :, None] < 0, 0.0)
        # Drafts may go past the end of the context; such tokens are never kept.
        return cls(column, rotary[positions.clamp(0, len(rotary) - 1)], bias)


@torch.inference_mode()
def extend(decoder: Decoder, tokens: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Append tokens [rows, n] to every row, as n calls of `Decoder.step` would.

    Returns:
        Logits [rows, n, vocab_size] of the token after each, and the hidden states [rows, n, hidden_size] behind the
        final norm.
    """
    n = tokens.shape[1]
    span = Span.at(decoder.model.rotary, cache, cache.length, n)

    def run(layer: DecoderLayer, x: Tensor, layer_cache: Tensor) -> Tensor:
        return extend_layer(layer, x, layer_cache, span, tokens)

    x = decoder.through(tokens, cache.layers, run)
    cache.length += n
    hidden = decoder.normed(x)
    return decoder.logits(hidden.flatten(0, 1)).unflatten(0, (-1, n)), hidden


def extend_layer(layer: DecoderLayer, x: Tensor, cache: Tensor, span: Span, tokens: Tensor | None = None) -> Tensor:
    """One block: x [rows, n, hidden_size] -> same; cache: this layer's [rows, capacity, width].

    `tokens`: ids [rows, n], which value embeddings read.
    """
    y = layer.input_norm(x)
    attention, values = layer.attention, layer.values(y, tokens)
    # Exactly these kinds: what derives from them reads the cache in a way of its own.
    if type(attention) is AbsorbedAttention and not attention.contextual and values is None:
        attended = _extend_absorbed(attention, y, x, cache, span)
    elif type(attention) is GroupedStep:
        attended = _extend_grouped(attention, y, x, cache, span, values)
    else:
        attended = _extend_by_steps(attention, y, x, cache, span, values)
    return layer.feed_forward(attended.flatten(0, 1)).view_as(x)


def _extend_by_steps(
    attention: DecodeAttention, y: Tensor, x: Tensor, cache: Tensor, span: Span, values: Tensor | None
) -> Tensor:
    out = []
    for i in range(y.shape[1]):
        column = span.column + i
        rotation, bias = span.rotation[:, i : i + 1], span.bias[:, i : i + 1, : column + 1]
        added = None if values is None else values[:, i]
        out.append(attention.step(y[:, i], x[:, i], rotation, cache, bias, column, added))
    return torch.stack(out, 1)


def _extend_absorbed(attention: AbsorbedAttention, y: Tensor, x: Tensor, cache: Tensor, span: Span) -> Tensor:
    """`AbsorbedAttention.step` where the new tokens of a row stand as further heads of it."""
    rows, n, _ = y.shape
    rotation, heads = span.rotation.flatten(0, 1).unsqueeze(1), attention.heads
    down = attention.down.product(y.flatten(0, 1))
    new = cache[:, span.column : span.column + n]
    projected = down[:, attention.first_width :].unflatten(0, (rows, n))
    write_latent(new, projected, attention.latent_norm, span.rotation)
    q = attention.in_latent_space(attention.queries(down[:, : attention.first_width]), rotation)
    seen = cache[:, : span.column + n]
    bias = span.bias.repeat_interleave(heads, 1)
    scores = torch.baddbmm(bias, q.reshape(rows, n * heads, -1), seen.transpose(1, 2))
    o = torch.bmm(torch.softmax(scores, -1), seen[:, :, : attention.config.kv_lora_rank])
    o = o.reshape(rows * n, heads, -1)
    if not attention.merged:
        o = torch.bmm(o.transpose(0, 1), attention.value).transpose(0, 1)
    return attention.leave(x.flatten(0, 1), o.flatten(1)).view_as(x)


def _extend_grouped(
    attention: GroupedStep, y: Tensor, x: Tensor, cache: Tensor, span: Span, values: Tensor | None
) -> Tensor:
    """`GroupedStep.step` where the new tokens of a row stand as further queries of each group."""
    rows, n, _ = y.shape
    heads, dim, groups = attention.heads, attention.config.head_dim, attention.groups
    projected = attention.projected(y.flatten(0, 1), None if values is None else values.flatten(0, 1))
    turned = projected[:, : heads * dim + attention.keys].unflatten(1, (-1, dim))
    rotate_in_place(turned, span.rotation.flatten(0, 1).unsqueeze(1))
    cache[:, span.column : span.column + n] = projected[:, heads * dim :].unflatten(0, (rows, n))
    q = projected[:, : heads * dim].view(rows, n, groups, heads // groups, dim).transpose(1, 2)
    seen = cache[:, : span.column + n].unflatten(2, (2, groups, dim))
    k, v = seen.permute(2, 0, 3, 1, 4).unbind(0)  # [rows, groups, columns, dim]
    bias = span.bias.repeat_interleave(heads // groups, 1).unsqueeze(1)
    out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=bias, scale=attention.inner.scale)
    out = out.unflatten(2, (n, -1)).transpose(1, 2).reshape(rows * n, heads * dim)
    return attention.leave(x.flatten(0, 1), out).view_as(x)

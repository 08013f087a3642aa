"""The decoder in operations that graph formats have: no complex numbers, no loops over tokens, no sizes that depend on
what a router chose. Shares the parameters of the model that it is made of.

MLA is absorbed, as decoding has it (`model.generate.absorbed`), so that the cache holds latents. Every token goes
through every expert, and what the router did not choose is multiplied by zero: the same sum, n_routed_experts /
num_experts_per_tok times the work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.grouped import GroupedAttention
from model.attention.indexer import Indexer, highest
from model.attention.mla import MultiHeadLatentAttention
from model.attention.sparse import SparseAttention
from model.config import ModelConfig
from model.layers.feed_forward import FeedForward
from model.layers.norm import DynamicTanh, RMSNorm
from model.moe.experts import MixtureOfExperts
from model.moe.router import Router
from model.transformer import Block, Transformer

HIDDEN = torch.finfo(torch.float32).min  # a score; minus infinity would make a row of padding NaN


def cache_width(config: ModelConfig) -> int:
    """Numbers that the cache holds of one token in one layer."""
    if not config.is_latent:
        return 2 * config.num_kv_heads * config.head_dim
    indexer = config.index_head_dim if config.attention == "dsa" else 0
    added = config.num_attention_heads * config.v_head_dim if config.value_embeddings else 0  # in all layers: one shape
    return config.kv_lora_rank + config.qk_rope_head_dim + indexer + added


def num_caches(config: ModelConfig) -> int:
    """Layers, counted once for each time that the stack is applied."""
    return config.num_hidden_layers * config.recursion_depth


class GraphDecoder(nn.Module):
    """Logits of new tokens behind a cache; without its MTP modules, which only drafting reads."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Transformer):
        super().__init__()
        self.model, self.config = model, model.config
        self.register_buffer("cos", model.rotary.real.clone(), persistent=False)
        self.register_buffer("sin", model.rotary.imag.clone(), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            input_ids: int64 [batch, new], the tokens behind `past`.
            attention_mask: int64 [batch, old + new], 0 for padding, on whichever side.
            past: [caches, batch, old, cache_width]; old is 0 for a prompt.
        Returns:
            Logits [batch, new, vocab_size] and the cache [caches, batch, old + new, cache_width].
        """
        new = input_ids.shape[1]
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        rotation = tuple(table[positions[:, -new:]].unsqueeze(2) for table in (self.cos, self.sin))
        visible = self._visible(attention_mask, positions, new)
        hidden, caches = self.model.embed_tokens(input_ids), list[Tensor]()
        start = hidden
        for index in range(self.config.recursion_depth):
            before = hidden
            for block in self.model.layers.values():
                assert isinstance(block, Block)
                hidden = block.read(hidden, start)
                y = _norm(block.input_layernorm, hidden)
                out, cache = _attend(block, y, rotation, visible, past[len(caches)], input_ids)
                caches.append(cache)
                hidden = hidden + out
                hidden = hidden + _feed(block.mlp, _norm(block.post_attention_layernorm, hidden))
            if self.model.recursion is not None:
                hidden = before + self.model.recursion.weight[index] * (hidden - before)
        logits = F.linear(_norm(self.model.norm, hidden), self.model.lm_head.weight)
        return logits, torch.stack(caches)

    def _visible(self, mask: Tensor, positions: Tensor, new: int) -> Tensor:
        """What each new token may read: bool [batch, new, old + new]."""
        place = (mask[:1] * 0 + 1).cumsum(1)  # not ones of this shape: converters of graphs want to know it beforehand
        here, asking = place[:, None, :], place[:, -new:, None]
        visible = torch.logical_and(here <= asking, mask[:, None, :] > 0)
        if self.config.attention == "sliding":
            every = positions[:, None, :] % self.config.global_stride == 0
            near = asking - here < self.config.sliding_window
            visible = torch.logical_and(visible, torch.logical_or(near, every))
        return visible


Rotation = tuple[Tensor, ...]  # cos and sin, each [batch, new, 1, rotary_dim / 2]
Attention = GroupedAttention | MultiHeadLatentAttention


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, DynamicTanh):
        return torch.tanh(norm.alpha * x) * norm.weight + norm.bias
    assert isinstance(norm, RMSNorm)
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def _parts(x: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """The last axis in two, as slices: of `split` torch.onnx makes sequences, which few runtimes know."""
    return x[..., :first], x[..., first : first + second]


def _turn(x: Tensor, rotation: Rotation) -> Tensor:
    """Pairs of neighbours turned: [batch, new, heads, rotary_dim] -> same."""
    cos, sin = rotation
    pairs = x.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _weights(attention: Attention, scores: Tensor, visible: Tensor, q: Tensor) -> Tensor:
    """softmax over what is visible: scores [..., new, keys], visible that broadcasts to it, q [..., new, dim]."""
    scores = _seen(scores, visible)
    if attention.config.position == "cope":
        scores = scores + _position_logits(scores, q @ attention.position_embedding.t())
    return scores.softmax(-1)


def _seen(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(torch.logical_not(visible), HIDDEN)


def _position_logits(scores: Tensor, per_position: Tensor) -> Tensor:
    """As `model.attention.cope.position_logits`, whose autograd function no graph format has."""
    position = scores.sigmoid().flip(-1).cumsum(-1).flip(-1).clamp(max=per_position.shape[-1] - 1)
    below, above = position.floor(), position.ceil()
    low, high = per_position.gather(-1, below.long()), per_position.gather(-1, above.long())
    return low + (position - below) * (high - low)


def _attend(
    block: Block, x: Tensor, rotation: Rotation, visible: Tensor, past: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """x [batch, new, hidden_size], past [batch, old, cache_width] -> output, and the cache with the new tokens."""
    attention, values = block.self_attn, block.values(x, tokens)
    if isinstance(attention, GroupedAttention):
        return _grouped(attention, x, rotation, visible, past, values)
    assert isinstance(attention, MultiHeadLatentAttention)
    return _latent(attention, x, rotation, visible, past, values)


def _grouped(
    attention: GroupedAttention, x: Tensor, rotation: Rotation, visible: Tensor, past: Tensor, values: Tensor | None
) -> tuple[Tensor, Tensor]:
    config = attention.config
    heads, kv_heads, dim = config.num_attention_heads, config.num_kv_heads, config.head_dim
    if config.attention == "mqa":
        k, v = _parts(F.linear(x, attention.kv_proj_with_mqa.weight), dim, dim)
    else:
        k, v = F.linear(x, attention.k_proj.weight), F.linear(x, attention.v_proj.weight)
    v = v if values is None else v + values.flatten(-2)
    if config.position == "rope":
        k = _turn(k.unflatten(-1, (kv_heads, dim)), rotation).flatten(-2)
    cache = torch.cat([past, torch.cat([k, v], -1)], 1)
    k, v = (
        part.unflatten(-1, (kv_heads, dim)).transpose(1, 2).unsqueeze(2)
        for part in _parts(cache, kv_heads * dim, kv_heads * dim)
    )
    q = F.linear(x, attention.q_proj.weight).unflatten(-1, (heads, dim))
    if config.position == "rope":
        q = _turn(q, rotation)
    q = q.transpose(1, 2).unflatten(1, (kv_heads, heads // kv_heads))  # of one key head next to each other
    scores = q @ k.transpose(-1, -2) * attention.scale
    out = (_weights(attention, scores, visible[:, None, None], q) @ v).flatten(1, 2)
    return F.linear(out.transpose(1, 2).flatten(2), attention.o_proj.weight), cache


def _latent(
    attention: MultiHeadLatentAttention, x: Tensor, rotation: Rotation, visible: Tensor, past: Tensor,
    values: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    config = attention.config
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    latent, k_rope = _parts(F.linear(x, attention.kv_a_proj_with_mqa.weight), rank, rope)
    if config.position == "rope":
        k_rope = _turn(k_rope.unsqueeze(2), rotation).squeeze(2)
    new = [_norm(attention.kv_a_layernorm, latent), k_rope]
    if config.q_lora_rank is None:
        query_latent, expand = x, attention.q_proj.weight
    else:
        query_latent = _norm(attention.q_a_layernorm, F.linear(x, attention.q_a_proj.weight))
        expand = attention.q_b_proj.weight
    if isinstance(attention, SparseAttention):
        new.append(_index_keys(attention.indexer, x, rotation))
    index_end = rank + rope + (config.index_head_dim if isinstance(attention, SparseAttention) else 0)
    if config.value_embeddings:
        new.append(F.pad(latent[..., :0], (0, heads * config.v_head_dim)) if values is None else values.flatten(-2))
    cache = torch.cat([past, torch.cat(new, -1)], 1)
    latents = cache[:, None, :, : rank + rope]
    if isinstance(attention, SparseAttention):
        keys = cache[:, :, rank + rope : index_end]
        visible = _chosen(attention.indexer, x, query_latent, keys, rotation, visible, config.index_topk)
    q = F.linear(query_latent, expand).unflatten(-1, (heads, config.qk_head_dim)).transpose(1, 2)
    q_nope, q_rope = _parts(q, config.qk_nope_head_dim, rope)
    if config.position == "rope":
        q_rope = _turn(q_rope.transpose(1, 2), rotation).transpose(1, 2)
    expanded = attention.kv_b_proj.weight.unflatten(0, (heads, -1))
    key, value = expanded[:, : config.qk_nope_head_dim], expanded[:, config.qk_nope_head_dim :]  # [heads, ., latent]
    scores = torch.cat([q_nope @ key, q_rope], -1) @ latents.transpose(-1, -2) * attention.scale
    weights = _weights(attention, scores, visible[:, None], q)
    out = weights @ latents[..., :rank] @ value.transpose(1, 2)
    if values is not None:
        out = out + weights @ cache[:, :, index_end:].unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.linear(out.transpose(1, 2).flatten(2), attention.o_proj.weight), cache


def _turn_halves(indexer: Indexer, x: Tensor, rotation: Rotation) -> Tensor:
    """As `Indexer.rotate`: [batch, new, heads, dim] -> same."""
    cos, sin = rotation
    turned, rest = _parts(x, indexer.rotary_dim, indexer.dim - indexer.rotary_dim)
    real, imaginary = _parts(turned, indexer.rotary_dim // 2, indexer.rotary_dim // 2)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos, rest], -1)


def _index_keys(indexer: Indexer, x: Tensor, rotation: Rotation) -> Tensor:
    keys = indexer.k_norm(F.linear(x, indexer.wk.weight))
    return _turn_halves(indexer, keys.unsqueeze(2), rotation).squeeze(2)


def _chosen(
    indexer: Indexer, x: Tensor, query_latent: Tensor, keys: Tensor, rotation: Rotation, visible: Tensor, topk: int
) -> Tensor:
    """What is visible and among the `topk` best of it: bool [batch, new, keys]; keys [batch, keys, index dim]."""
    q = F.linear(query_latent, indexer.wq_b.weight).unflatten(-1, (indexer.heads, indexer.dim))
    q = _turn_halves(indexer, q, rotation).transpose(1, 2)
    weights = F.linear(x, indexer.weights_proj.weight) * (indexer.dim * indexer.heads) ** -0.5
    products = (q @ keys.unsqueeze(1).transpose(-1, -2)).relu()  # [batch, index heads, new, keys]
    scores = (products * weights.transpose(1, 2).unsqueeze(-1)).sum(1)
    scores = _seen(scores, visible)
    # Before them as many that nobody can choose as make `topk`: short rows have fewer, and of equals the last win.
    scores = F.pad(scores, (topk, 0), value=HIDDEN)
    return torch.logical_and(visible, highest(scores, topk)[..., topk:])


def _feed(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, FeedForward):
        return _swiglu(layer, x)
    assert isinstance(layer, MixtureOfExperts)
    weights = _routing(layer.gate, x)  # [batch, new, experts]
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    inner = down.shape[2]
    gate, up = _parts(F.linear(x, gate_up.flatten(0, 1)).unflatten(-1, (gate_up.shape[0], -1)), inner, inner)
    activated = F.silu(gate) * up * weights.unsqueeze(-1)
    out = F.linear(activated.flatten(-2), down.transpose(0, 1).flatten(1))
    return out if layer.shared_experts is None else out + _swiglu(layer.shared_experts, x)


def _swiglu(layer: FeedForward, x: Tensor) -> Tensor:
    inner = F.silu(F.linear(x, layer.gate_proj.weight)) * F.linear(x, layer.up_proj.weight)
    return F.linear(inner, layer.down_proj.weight)


def _routing(router: Router, x: Tensor) -> Tensor:
    """Weights of all experts, zero for those not chosen: [..., hidden_size] -> [..., experts]; as `Router.forward`."""
    config = router.config
    logits = F.linear(x, router.weight)
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
    choice = scores + router.e_score_correction_bias if router.has_bias else scores
    if config.n_group > 1 and config.topk_method != "greedy":
        grouped = choice.unflatten(-1, (config.n_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1) if router.has_bias else grouped.amax(-1)
        choice = grouped.masked_fill(_highest(best, config.topk_group).unsqueeze(-1) == 0, HIDDEN).flatten(-2)
    weights = scores * _highest(choice, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor


def _highest(scores: Tensor, count: int) -> Tensor:
    """1 at the `count` highest of each row, 0 elsewhere."""
    chosen = scores.topk(count, dim=-1).indices.unsqueeze(-1)
    return (chosen == torch.arange(scores.shape[-1])).to(scores.dtype).sum(-2)

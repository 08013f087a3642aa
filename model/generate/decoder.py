"""A built Transformer made ready to produce one token at a time: absorbed MLA over a latent cache.

The key expansion W_UK is absorbed into the query and the value expansion W_UV into the output projection (DeepSeek-V2,
arXiv:2405.04434, §2.1.2), so a step reads only the cached latents. The prefix runs through the model's own modules.
Knows nothing of sampling or of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.mla import MultiHeadLatentAttention
from model.generate.cache import LatentCache
from model.layers.feed_forward import FeedForward
from model.layers.rope import apply_rotary
from model.moe.experts import MixtureOfExperts, RoutedExperts
from model.transformer import Block, Transformer

# Up to this many rows, running every expert on every row is quicker than sorting rows by expert (measured on CPU).
DENSE_EXPERT_ROWS = 32
# Tokens of prefix that run through the model at once; bounds the memory of masks and activations.
PREFILL_TOKENS = 16384


class AbsorbedAttention:
    """One layer's MLA for one new token a row. Weights are stored [in, out]."""

    def __init__(self, attention: MultiHeadLatentAttention):
        config = self.config = attention.config
        self.inner = attention
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        first = attention.q_proj if config.q_lora_rank is None else attention.q_a_proj
        self.first_width = first.weight.shape[0]
        self.down = torch.cat([first.weight, attention.kv_a_proj_with_mqa.weight]).t().contiguous()
        key, value = attention.kv_b_proj.weight.unflatten(0, (heads, -1)).split(
            [config.qk_nope_head_dim, config.v_head_dim], 1
        )  # [heads, nope, latent], [heads, v, latent]
        self.key, self.value = key.contiguous(), value.transpose(1, 2).contiguous()
        self.out = attention.o_proj.weight.t().contiguous()  # [heads * v, hidden]
        self.query = None if config.q_lora_rank is None else attention.q_b_proj.weight.t() * attention.scale
        # Multiplying the factors together saves two operations a step, but is more work where the latent is much wider
        # than a head (DeepSeek-V3: 512 against 128).
        self.merged = config.q_lora_rank is not None and latent <= 2 * config.qk_nope_head_dim
        if self.merged:
            assert self.query is not None
            nope, rope = self.query.unflatten(1, (heads, -1)).split(
                [config.qk_nope_head_dim, config.qk_rope_head_dim], 2
            )
            absorbed = torch.einsum("qhn,hnl->qhl", nope, self.key)
            self.query = torch.cat([absorbed, rope], 2).flatten(1).contiguous()
            self.out = torch.einsum("hlv,hvd->hld", self.value, self.out.unflatten(0, (heads, -1))).flatten(0, 1)

    def queries(self, first: Tensor, rotation: Tensor) -> Tensor:
        """Scaled queries in latent space: [rows, first_width] -> [rows, heads, kv_lora_rank + qk_rope_head_dim]."""
        config, inner = self.config, self.inner
        if self.query is None:
            q = first * inner.scale
        else:
            norm = inner.q_a_layernorm
            q = torch.mm(F.rms_norm(first, norm.weight.shape, norm.weight, norm.eps), self.query)
        q = q.unflatten(1, (config.num_attention_heads, -1))
        if not self.merged:
            nope, rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], 2)
            q = torch.cat([torch.bmm(nope.transpose(0, 1), self.key).transpose(0, 1), rope], 2)
        rotate_in_place(q[:, :, config.kv_lora_rank :], rotation)
        return q

    def step(self, x: Tensor, residual: Tensor, rotation: Tensor, cache: Tensor, bias: Tensor, column: int) -> Tensor:
        """Attend to the columns up to `column`, which is written first.

        Args:
            x: [rows, hidden_size], normalised; residual: same, added to the result.
            rotation: complex [rows, 1, qk_rope_head_dim / 2].
            cache: this layer's [rows, capacity, kv_lora_rank + qk_rope_head_dim]; bias: [rows, 1, column + 1].
        """
        latent = self.config.kv_lora_rank
        down = torch.mm(x, self.down)
        norm = self.inner.kv_a_layernorm
        write_latent(cache[:, column : column + 1], down[:, None, self.first_width :], norm.weight, norm.eps, rotation)
        seen = cache[:, : column + 1]
        q = self.queries(down[:, : self.first_width], rotation)
        scores = torch.baddbmm(bias, q, seen.transpose(1, 2))
        o = torch.bmm(torch.softmax(scores, -1), seen[:, :, :latent])  # [rows, heads, latent]
        if not self.merged:
            o = torch.bmm(o.transpose(0, 1), self.value).transpose(0, 1)
        return torch.addmm(residual, o.flatten(1), self.out)


def rotate_in_place(x: Tensor, rotation: Tensor) -> None:
    """Turn the pairs of x [rows, n, dim] by complex rotation [rows, 1 or n, dim / 2]."""
    if x.dtype == torch.float32:
        torch.view_as_complex(x.unflatten(2, (-1, 2))).mul_(rotation)
    else:  # complex numbers of half precision barely exist in torch
        x.copy_(apply_rotary(x.unsqueeze(2), rotation.expand(-1, x.shape[1], -1)).squeeze(2))


def write_latent(into: Tensor, projected: Tensor, weight: Tensor, eps: float, rotation: Tensor) -> None:
    """Normalised latent and rotated key into the cache: both [rows, n, kv_lora_rank + qk_rope_head_dim]."""
    latent = weight.shape[0]
    into[:, :, :latent] = F.rms_norm(projected[:, :, :latent], weight.shape, weight, eps)
    key = into[:, :, latent:]
    key.copy_(projected[:, :, latent:])
    rotate_in_place(key, rotation)


class FastExperts:
    """Routed experts without autograd's bookkeeping. Weights are stored [experts, in, out]."""

    def __init__(self, experts: RoutedExperts):
        self.gate_up = experts.gate_up_proj.transpose(1, 2).contiguous()
        self.down = experts.down_proj.transpose(1, 2).contiguous()
        self.num_experts, self.hidden, width = self.gate_up.shape
        self.inner = width // 2

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [rows, hidden]; indices, weights [rows, k] -> [rows, hidden]."""
        if x.shape[0] <= DENSE_EXPERT_ROWS and self.num_experts <= DENSE_EXPERT_ROWS:
            return self._all(x, indices, weights)
        return self._sorted(x, indices, weights)

    def _all(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        share = torch.zeros(x.shape[0], self.num_experts, device=x.device).scatter_(1, indices, weights).to(x.dtype)
        inner = self._activate(torch.matmul(x, self.gate_up))  # [experts, rows, inner]
        return torch.bmm(inner.mul_(share.t().unsqueeze(2)), self.down).sum(0)

    def _sorted(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        chosen = indices.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        row = order // indices.shape[1]
        gate_up = self._per_expert(x[row], self.gate_up, counts)
        inner = self._activate(gate_up).mul_(weights.flatten()[order].unsqueeze(1).to(x.dtype))
        return torch.zeros_like(x).index_add_(0, row, self._per_expert(inner, self.down, counts))

    def _activate(self, gate_up: Tensor) -> Tensor:
        return F.silu(gate_up[..., : self.inner]).mul_(gate_up[..., self.inner :])

    def _per_expert(self, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[2])
        for rows, into, w in zip(x.split(counts), out.split(counts), weight, strict=True):
            torch.mm(rows, w, out=into)
        return out


class DecoderLayer:
    """One block for one new token a row."""

    def __init__(self, block: Block):
        self.attention = AbsorbedAttention(block.self_attn)
        self.input_norm, self.post_norm = block.input_layernorm, block.post_attention_layernorm
        moe = block.mlp if isinstance(block.mlp, MixtureOfExperts) else None
        self.router = None if moe is None else moe.gate
        self.experts = None if moe is None else FastExperts(moe.experts)
        dense = block.mlp if moe is None else moe.shared_experts
        self.gate_up: Tensor | None = None
        if dense is not None:
            assert isinstance(dense, FeedForward)
            self.gate_up = torch.cat([dense.gate_proj.weight, dense.up_proj.weight]).t().contiguous()
            self.down = dense.down_proj.weight.t().contiguous()
            self.inner = self.down.shape[0]

    def step(self, x: Tensor, rotation: Tensor, cache: Tensor, bias: Tensor, column: int) -> Tensor:
        """[rows, hidden_size] -> same; arguments as in `AbsorbedAttention.step`."""
        norm = self.input_norm
        y = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        x = self.attention.step(y, x, rotation, cache, bias, column)
        norm = self.post_norm
        y = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        if self.gate_up is not None:
            gate_up = torch.mm(y, self.gate_up)
            inner = F.silu(gate_up[:, : self.inner]).mul_(gate_up[:, self.inner :])
            x = torch.addmm(x, inner, self.down)
        if self.router is not None and self.experts is not None:
            x = x.add(self.experts(y, *self.router(y)))
        return x


@dataclass
class Decoder:
    """A whole Transformer with decode-friendly weights. Call `refresh` after the model's weights changed.

    Raises:
        ValueError: if the model is one pipeline stage.
    """

    model: Transformer

    def __post_init__(self) -> None:
        if not (self.model.is_first and self.model.is_last):
            raise ValueError(f"layers {self.model.layer_range}: decoding needs the whole model, not a pipeline stage")
        self.config = self.model.config
        self.refresh()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.lm_head.weight.device

    def _blocks(self) -> list[Block]:
        return [block for block in self.model.layers.values() if isinstance(block, Block)]

    @torch.inference_mode()
    def refresh(self) -> None:
        """Merge and lay out the weights again."""
        self.layers = [DecoderLayer(block) for block in self._blocks()]
        self.head = self.model.lm_head.weight.t().contiguous()

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], capacity: int) -> tuple[Tensor, LatentCache]:
        """Run the prompts and remember them.

        Args:
            prompts: token ids, none empty. capacity: columns to keep free behind the longest.
        Returns:
            Logits of the token after each prompt, [rows, vocab_size], and the cache.
        """
        longest = max(len(p) for p in prompts)
        padding = torch.tensor([longest - len(p) for p in prompts], device=self.device)
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        cache = LatentCache.allocate(self.config, padding, longest + capacity, self.head.dtype)
        rows = max(1, PREFILL_TOKENS // longest)
        last = [
            self._prefill_rows(tokens[i : i + rows], padding[i : i + rows], [c[i : i + rows] for c in cache.layers])
            for i in range(0, len(prompts), rows)
        ]
        cache.length = longest
        return self.model.lm_head(self.model.norm(torch.cat(last))), cache

    def _prefill_rows(self, tokens: Tensor, padding: Tensor, cache: list[Tensor]) -> Tensor:
        """Hidden state of the last token of each row: [rows, hidden_size]."""
        length = tokens.shape[1]
        # Padding is a document of its own: it gets no attention and the text behind it starts at position 0.
        doc_ids = (torch.arange(length, device=tokens.device) >= padding[:, None]).long()
        rotation, mask = self.model.context(doc_ids if bool(padding.any()) else None, length)
        x = self.model.embed_tokens(tokens)
        for block, layer_cache in zip(self._blocks(), cache, strict=True):
            y = block.input_layernorm(x)
            attention = block.self_attn
            projected, norm = attention.kv_a_proj_with_mqa(y), attention.kv_a_layernorm
            write_latent(layer_cache[:, :length], projected, norm.weight, norm.eps, rotation)
            x = x + attention(y, rotation, mask)
            x = x + block.mlp(block.post_attention_layernorm(x))
        return x[:, -1]

    @torch.inference_mode()
    def step(self, tokens: Tensor, cache: LatentCache) -> Tensor:
        """Append one token to every row: tokens [rows] -> logits of the next, [rows, vocab_size]."""
        column = cache.length
        rotation = self.model.rotary[cache.positions].unsqueeze(1)
        bias = cache.bias[:, :, : column + 1]
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer.step(x, rotation, layer_cache, bias, column)
        cache.length += 1
        norm = self.model.norm
        return torch.mm(F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps), self.head)

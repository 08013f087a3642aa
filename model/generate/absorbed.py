"""Multi-head Latent Attention for one new token a row, in the absorbed form.

The key expansion W_UK is absorbed into the query and the value expansion W_UV into the output projection (DeepSeek-V2,
arXiv:2405.04434, §2.1.2), so a step reads only the cached latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.cope import position_logits
from model.attention.mla import MultiHeadLatentAttention
from model.kernels.cpu.products import Factor, FactorInPlace, factor
from model.layers.norm import FastNorm
from model.layers.rope import apply_rotary
from model.parallel.collectives import Axis, reduce_from


class AbsorbedAttention:
    """One layer's MLA for one new token a row. Weights are stored [in, out], or read in place.

    Attributes:
        heads: of this rank; under tensor parallelism `leave` adds up what the ranks' heads give.
    """

    def __init__(self, attention: MultiHeadLatentAttention, adds_values: bool = False, *, in_place: bool = False):
        config = self.config = attention.config
        self.inner, self.adds_values = attention, adds_values
        self.latent_norm = FastNorm(attention.kv_a_layernorm)
        self.query_norm = None if config.q_lora_rank is None else FastNorm(attention.q_a_layernorm)
        heads, latent = config.num_attention_heads // attention.tp.size, config.kv_lora_rank
        self.heads = heads
        first = attention.q_proj if config.q_lora_rank is None else attention.q_a_proj
        self.keys = latent + config.qk_rope_head_dim  # of the cache's features, what scores meet
        self.width = self.keys + (heads * config.v_head_dim if adds_values else 0)
        self.first_width = first.weight.shape[0]
        self.down = factor(first.weight, attention.kv_a_proj_with_mqa.weight, in_place=in_place)
        key, value = attention.kv_b_proj.weight.unflatten(0, (heads, -1)).split(
            [config.qk_nope_head_dim, config.v_head_dim], 1
        )  # [heads, nope, latent], [heads, v, latent]
        self.contextual = config.position == "cope"
        self.query: Factor | FactorInPlace | None
        self.out: Factor | FactorInPlace
        if in_place:
            self.merged, self.query_scale = False, attention.scale
            self.key, self.value = key, value.transpose(1, 2)
            self.query = None if config.q_lora_rank is None else factor(attention.q_b_proj.weight, in_place=True)
            self.out = factor(attention.o_proj.weight, in_place=True)
            return
        self.query_scale = 1.0
        self.key, self.value = key.contiguous(), value.transpose(1, 2).contiguous()
        out = attention.o_proj.weight.t().contiguous()  # [heads * v, hidden]
        query = None if config.q_lora_rank is None else attention.q_b_proj.weight.t() * attention.scale
        # Multiplying the factors together saves two operations a step, but is more work where the latent is much wider
        # than a head (DeepSeek-V3: 512 against 128). Contextual positions read the query itself, and
        # added values join what single heads read.
        self.merged = query is not None and latent <= 2 * config.qk_nope_head_dim
        self.merged = self.merged and not self.contextual and not adds_values
        if self.merged:
            assert query is not None
            nope, rope = query.unflatten(1, (heads, -1)).split([config.qk_nope_head_dim, config.qk_rope_head_dim], 2)
            absorbed = torch.einsum("qhn,hnl->qhl", nope, self.key)
            query = torch.cat([absorbed, rope], 2).flatten(1)
            out = torch.einsum("hlv,hvd->hld", self.value, out.unflatten(0, (heads, -1))).flatten(0, 1)
        self.query, self.out = None if query is None else Factor(query.contiguous()), Factor(out)

    def queries(self, first: Tensor) -> Tensor:
        """Scaled and not yet rotated: [rows, first_width] -> [rows, heads, qk_head_dim], where merged [..., keys]."""
        if self.query is None or self.query_norm is None:
            q = first * self.inner.scale
        else:
            q = self.query.product(self.query_norm(first))
            q = q if self.query_scale == 1.0 else q.mul_(self.query_scale)
        return q.view(len(q), self.heads, -1)

    def in_latent_space(self, q: Tensor, rotation: Tensor) -> Tensor:
        """What `queries` gave, as the cache's columns are to be met: [rows, heads, keys]."""
        config = self.config
        if not self.merged:
            nope, rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], 2)
            q = torch.cat([torch.bmm(nope.transpose(0, 1), self.key).transpose(0, 1), rope], 2)
        if not self.contextual:
            rotate_in_place(q[:, :, config.kv_lora_rank :], rotation)
        return q

    def remember(self, y: Tensor, rotation: Tensor, into: Tensor, values: Tensor | None = None) -> None:
        """Normalised latents, rotated keys and added values of a prefix, y [rows, n, hidden_size], into
        [rows, n, width]."""
        self._write(into, self.inner.kv_a_proj_with_mqa(y), rotation, values)

    def _write(self, into: Tensor, projected: Tensor, rotation: Tensor, values: Tensor | None) -> None:
        write_latent(into[:, :, : self.keys], projected, self.latent_norm, None if self.contextual else rotation)
        if values is not None:
            into[:, :, self.keys :] = values.reshape(*into.shape[:2], -1)

    def step(
        self, x: Tensor, residual: Tensor, rotation: Tensor, cache: Tensor, bias: Tensor, column: int,
        values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend to the columns up to `column`, which is written first.

        Args:
            x: [rows, hidden_size], normalised; residual: same, added to the result.
            rotation: complex [rows, 1, qk_rope_head_dim / 2].
            cache: this layer's [rows, capacity, width]; bias: [rows, 1, column + 1].
            values: [rows, heads, v_head_dim], added to the new token's.
        """
        down = self.down.product(x)
        self._write(cache[:, column : column + 1], down[:, None, self.first_width :], rotation, values)
        seen = cache[:, : column + 1]
        q = self.queries(down[:, : self.first_width])
        scores = torch.baddbmm(bias, self.in_latent_space(q, rotation), seen[:, :, : self.keys].transpose(1, 2))
        if self.contextual:
            # The product with the table is not scaled, and the query is.
            positions = q @ self.inner.position_embedding.t() / self.inner.scale
            exact = scores.float()
            scores = (exact + position_logits(exact, positions)).to(scores.dtype)
        return self.attend(scores, seen, residual)

    def attend(self, scores: Tensor, seen: Tensor, residual: Tensor) -> Tensor:
        """scores [rows, heads, n] over the columns seen [rows, n, width] -> residual + output, [rows, hidden_size]."""
        weights = torch.softmax(scores, -1)
        o = torch.bmm(weights, seen[:, :, : self.config.kv_lora_rank])  # [rows, heads, latent]
        if not self.merged:
            o = torch.bmm(o.transpose(0, 1), self.value).transpose(0, 1)
        if self.adds_values:
            added = seen[:, :, self.keys :].unflatten(2, (o.shape[1], -1)).transpose(1, 2)  # [rows, heads, n, v]
            o = o + (weights.unsqueeze(2) @ added).squeeze(2)
        return self.leave(residual, o.flatten(1))

    def leave(self, residual: Tensor, o: Tensor) -> Tensor:
        """residual [rows, hidden_size] plus the output projection of all heads; o: of mine, [rows, heads * width]."""
        return added_over_ranks(residual, o, self.out, self.inner.tp)


def added_over_ranks(residual: Tensor, o: Tensor, out: Factor | FactorInPlace, tp: Axis) -> Tensor:
    """residual plus the products of all tensor-parallel ranks, of which `out.product(o)` is mine."""
    return out.added_product(residual, o) if tp.size == 1 else residual + reduce_from(out.product(o), tp)


def rotate_in_place(x: Tensor, rotation: Tensor) -> None:
    """Turn the pairs of x [rows, n, dim] by complex rotation [rows, 1 or n, dim / 2]."""
    if x.dtype == torch.float32 and not (x.storage_offset() | x.stride(0) | x.stride(1)) % 2:
        x.view(torch.complex64).mul_(rotation)
    else:  # complex numbers of half precision barely exist in torch, and others begin at even places alone
        exact = x.to(torch.float32, copy=True).unsqueeze(2)
        x.copy_(apply_rotary(exact, rotation.expand(-1, x.shape[1], -1)).squeeze(2))


def write_latent(into: Tensor, projected: Tensor, norm: FastNorm, rotation: Tensor | None) -> None:
    """Normalised latent and shared key, rotated if at all, into the cache: both [rows, n, width]."""
    into.copy_(projected)
    normalised = into[:, :, : norm.dim]
    normalised.copy_(norm(normalised))
    if rotation is not None:
        rotate_in_place(into[:, :, norm.dim :], rotation)

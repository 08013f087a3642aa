"""A built Transformer made ready to produce one token at a time over a cache.

What an attention reads and writes there is its decode object's matter (`model.generate.attention_steps`). The prefix
runs through the model's own modules. Knows nothing of sampling or of requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.generate.attention_steps import build_decode_attention
from model.generate.cache import KVCache
from model.kernels.cpu.products import Factor
from model.kernels.decode_experts import DecodeExperts
from model.layers.feed_forward import FeedForward
from model.layers.norm import prepared
from model.moe.experts import MixtureOfExperts
from model.moe.replay import columns
from model.mtp import MultiTokenPredictor
from model.transformer import Block, Transformer

# Tokens of prefix that run through the model at once; bounds the memory of masks and activations.
PREFILL_TOKENS = 16384


class DecoderLayer:
    """One block for one new token a row.

    Attributes:
        in_place: weights are read where they are; else laid out anew for decoding.
    """

    in_place = False

    def __init__(self, block: Block):
        self.block, self.read, self.values = block, block.read, block.values
        adds_values = block.value_embedding is not None
        self.attention = build_decode_attention(block.self_attn, adds_values, in_place=self.in_place)
        self.input_norm, self.post_norm = prepared(block.input_layernorm), prepared(block.post_attention_layernorm)
        moe = block.mlp if isinstance(block.mlp, MixtureOfExperts) else None
        self.router = None if moe is None else moe.gate
        if not self.in_place:
            self._lay_out(block, moe)

    def _lay_out(self, block: Block, moe: MixtureOfExperts | None) -> None:
        """The second half's weights."""
        self.experts = None if moe is None else DecodeExperts(moe.experts.gate_up_proj, moe.experts.down_proj)
        dense = block.mlp if moe is None else moe.shared_experts
        self.gate_up: Factor | None = None
        if dense is not None:
            assert isinstance(dense, FeedForward)
            self.gate_up = Factor(torch.cat([dense.gate_proj.weight, dense.up_proj.weight]).t().contiguous())
            self.down = Factor(dense.down_proj.weight.t().contiguous())
            self.inner = dense.down_proj.in_features

    def step(self, x: Tensor, rotation: Tensor, cache: Tensor, bias: Tensor, column: int, tokens: Tensor) -> Tensor:
        """[rows, hidden_size] -> same; tokens [rows], the other arguments as in `DecodeAttention.step`."""
        y = self.input_norm(x)
        return self.feed_forward(self.attention.step(y, x, rotation, cache, bias, column, self.values(y, tokens)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The block's second half with its residual, for tokens of any row: [rows, hidden_size] -> same."""
        y = self.post_norm(x)
        if self.gate_up is not None:
            gate_up = self.gate_up.product(y)
            inner = F.silu(gate_up[:, : self.inner]).mul_(gate_up[:, self.inner :])
            x = self.down.added_product(x, inner)
        if self.router is not None and self.experts is not None:
            x = self.experts.added(x, y, *self.router(y))
        return x


LayerRun = Callable[[DecoderLayer, Tensor, Tensor], Tensor]
"""(layer, what it reads [..., hidden_size], its cache) -> what it gives, of the same shape."""


@dataclass
class Decoder:
    """A whole Transformer with decode-friendly weights. Call `refresh` after the model's weights changed.

    Raises:
        ValueError: if the model is one pipeline stage.
    """

    model: Transformer
    kind = DecoderLayer

    def __post_init__(self) -> None:
        if not (self.model.is_first and self.model.is_last):
            raise ValueError(f"layers {self.model.layer_range}: decoding needs the whole model, not a pipeline stage")
        self.config = self.model.config
        self.refresh()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.lm_head.weight.dtype

    @torch.inference_mode()
    def refresh(self) -> None:
        """Merge and lay out the weights again."""
        self.layers = [self.kind(block) for block in self.model.layers.values() if isinstance(block, Block)]
        self.norm = prepared(self.model.norm)
        self.head = Factor(self.model.lm_head.weight.t().contiguous())
        self._draft_layers: list[DecoderLayer] | None = None

    @property
    def draft_layers(self) -> list[DecoderLayer]:
        """The MTP modules' blocks, laid out when speculative decoding first asks for them."""
        if self._draft_layers is None:
            blocks = [module.block for module in self.model.mtp if isinstance(module, MultiTokenPredictor)]
            self._draft_layers = [self.kind(block) for block in blocks if isinstance(block, Block)]
        return self._draft_layers

    @property
    def routing_columns(self) -> list[int]:
        """Columns of a recorded routing (`model.moe.replay`) that belong to the layers here, in their order."""
        return list(range(columns(self.config)))

    def joined_routing(self, ids: Tensor) -> Tensor:
        """Expert ids with the columns of all layers, from those with the columns of the layers here."""
        return ids

    def idle(self) -> None:
        """To be called when nothing is left to decode: here there is nobody who waits for this decoder."""

    def passes(self, cache: list[Tensor]) -> list[list[Tensor]]:
        """The layers' caches of each pass through the stack, from all of them in order."""
        count = len(self.layers)
        assert len(cache) == count * self.config.recursion_depth
        return [cache[i : i + count] for i in range(0, len(cache), count)]

    def after_pass(self, before: Tensor, after: Tensor, index: int) -> Tensor:
        """What goes on from pass `index` through the stack, of its input and output: [..., hidden_size] -> same."""
        return after if self.model.recursion is None else self.model.recursion(before, after, index)

    @torch.inference_mode()
    def prefill(
        self, prompts: list[list[int]], capacity: int, watch: Callable[[Tensor, slice], None] | None = None
    ) -> tuple[Tensor, KVCache]:
        """Run the prompts and remember them.

        Args:
            prompts: token ids, none empty. capacity: columns to keep free behind the longest.
            watch: called for each part of the prompts with its hidden states behind the final norm, right-aligned
                [rows, longest, hidden_size], and the rows.
        Returns:
            Logits of the token after each prompt, [rows, vocab_size], and the cache.
        """
        longest = max(len(p) for p in prompts)
        padding = torch.tensor([longest - len(p) for p in prompts], device=self.device)
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        widths = [layer.attention.width for layer in self.layers] * self.config.recursion_depth
        cache = KVCache.allocate(widths, padding, longest + capacity, self.dtype)
        rows = max(1, PREFILL_TOKENS // longest)
        last = []
        for part in (slice(i, i + rows) for i in range(0, len(prompts), rows)):
            hidden = self._prefill_rows(tokens[part], padding[part], [c[part] for c in cache.layers])
            if watch is not None:
                watch(self.normed(hidden), part)
            last.append(hidden[:, -1])
        cache.length = longest
        return self.logits_of_prompts(torch.cat(last)), cache

    def embed(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., hidden_size]."""
        return F.embedding(tokens, self.model.embed_tokens.weight)

    def normed(self, hidden: Tensor) -> Tensor:
        """What the head and the MTP modules read of hidden states behind the last layer: same shape."""
        out: Tensor = self.model.norm(hidden)
        return out

    def logits(self, normed: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab_size]."""
        return self.head.product(normed)

    def logits_of_prompts(self, hidden: Tensor) -> Tensor:
        """The same for hidden states behind the last layer, by the model's own modules."""
        out: Tensor = self.model.lm_head(self.model.norm(hidden))
        return out

    def through(self, tokens: Tensor, cache: list[Tensor], run: LayerRun) -> Tensor:
        """Tokens through all layers: [...] -> hidden states [..., hidden_size] behind the last.

        Args:
            run: one layer, of what it reads.
        """
        x = start = self.embed(tokens)
        for index, passed in enumerate(self.passes(cache)):
            before = x
            for layer, layer_cache in zip(self.layers, passed, strict=True):
                x = run(layer, layer.read(x, start), layer_cache)
            x = self.after_pass(before, x, index)
        return x

    def _prefill_rows(self, tokens: Tensor, padding: Tensor, cache: list[Tensor]) -> Tensor:
        """Hidden states behind the last layer: [rows, longest, hidden_size]."""
        length = tokens.shape[1]
        # Padding is a document of its own: it gets no attention and the text behind it starts at position 0.
        doc_ids = (torch.arange(length, device=tokens.device) >= padding[:, None]).long()
        rotation, mask = self.model.context(doc_ids if bool(padding.any()) else None, length)

        def run(layer: DecoderLayer, x: Tensor, layer_cache: Tensor) -> Tensor:
            block = layer.block
            y = block.input_layernorm(x)
            values = block.values(y, tokens)
            layer.attention.remember(y, rotation, layer_cache[:, :length], values)
            x = x + block.self_attn(y, rotation, mask, values=values)
            out: Tensor = x + block.mlp(block.post_attention_layernorm(x))
            return out

        return self.through(tokens, cache, run)

    @torch.inference_mode()
    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token to every row: tokens [rows] -> logits of the next, [rows, vocab_size]."""
        column = cache.length
        # Rows that ended stay in the batch for a while; what they go on with, past the context too, is thrown away.
        rotation = self.model.rotary[cache.positions.clamp(max=len(self.model.rotary) - 1)].unsqueeze(1)
        bias = cache.bias[:, :, : column + 1]

        def run(layer: DecoderLayer, x: Tensor, layer_cache: Tensor) -> Tensor:
            return layer.step(x, rotation, layer_cache, bias, column, tokens)

        x = self.through(tokens, cache.layers, run)
        cache.length += 1
        return self.logits(self.norm(x))

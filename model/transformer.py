"""The DeepSeek-V3 decoder, whole or as one pipeline stage of consecutive layers.

A stage keeps global layer indices in its parameter names, so the stages' state dicts together are the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, repeat
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.core import document_positions
from model.attention.kinds import build_attention, visible_tokens
from model.config import ModelConfig
from model.layers.auxiliary import EVERY_TOKEN, Counting, LayerLosses
from model.layers.feed_forward import FeedForward
from model.layers.linear import as_operand
from model.layers.loss import tokens_ahead
from model.layers.norm import build_norm
from model.layers.residual import build_residual_scales
from model.layers.rope import rotary_table
from model.layers.values import build_value_embedding
from model.layers.vocab import Embedding, Head
from model.moe.experts import MixtureOfExperts
from model.moe.replay import split_routing
from model.mtp import MultiTokenPredictor
from model.parallel.collectives import LOCAL, Arrivals, Axis
from model.recursion import build_recursion

Recompute = Literal["none", "selective", "full"]


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals; routed experts from layer `first_k_dense_replace` on.

    `recompute` trades time for memory in the backward pass (arXiv:1604.06174): "selective" keeps no activations of
    attention, "full" none of the block but its input.
    """

    recompute: Recompute = "none"

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.residual = build_residual_scales(config, layer)
        self.input_layernorm = build_norm(config)
        self.value_embedding = build_value_embedding(config, layer)
        self.self_attn = build_attention(config)
        self.post_attention_layernorm = build_norm(config)
        dense = FeedForward(config.hidden_size, config.intermediate_size)
        self.mlp: nn.Module = MixtureOfExperts(config) if config.is_moe_layer(layer) else dense

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        routing: Tensor | None = None,
        counting: Counting = EVERY_TOKEN,
        start: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """x [batch, seq / sp, hidden_size] -> same; `routing` and `counting` as `MixtureOfExperts` takes them.

        `start`: the embedding of the same tokens, which learned scales of the residual stream read.
        `tokens`: their ids [batch, seq / sp], which value embeddings read.
        """
        x = self.read(x, start)
        if self.recompute == "full" and torch.is_grad_enabled():
            return _checkpointed(self._run, counting, x, rotation, mask, routing, tokens)
        return self._run(counting, x, rotation, mask, routing, tokens)

    def read(self, x: Tensor, start: Tensor | None) -> Tensor:
        """What the block makes of the stream x, both [..., hidden_size], before its own work."""
        if self.residual is None:
            return x
        assert start is not None
        return self.residual(x, start)

    def values(self, y: Tensor, tokens: Tensor | None) -> Tensor | None:
        """What is added to the values of attention that reads y [..., hidden_size]: [..., kv_heads / tp, v_dim]."""
        if self.value_embedding is None:
            return None
        assert tokens is not None
        added: Tensor = self.value_embedding(y, tokens)
        return added

    def _run(
        self, counting: Counting, x: Tensor, rotation: Tensor, mask: Tensor | None, routing: Tensor | None,
        tokens: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if self.recompute == "selective" and torch.is_grad_enabled():
            x = _checkpointed(self._attend, counting, x, rotation, mask, tokens)
        else:
            x = self._attend(counting, x, rotation, mask, tokens)
        x, y = self.post_attention_layernorm.beside(x)
        return x + (self.mlp(y, routing, counting) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(y))

    def _attend(
        self, counting: Counting, x: Tensor, rotation: Tensor, mask: Tensor | None, tokens: Tensor | None
    ) -> Tensor:
        x, y = self.input_layernorm.beside(x)
        y = as_operand(y)
        return x + self.self_attn(y, rotation, mask, counting, self.values(y, tokens))


def _checkpointed(function: Callable[..., Tensor], counting: Counting, *args: Tensor | None) -> Tensor:
    """`function(counting, *args)`, whose activations backward computes again, without counting them again, and without
    sending tokens to their experts again."""
    arrivals = Arrivals()
    again = (replace(counting, repeated=True, arrivals=arrivals.again()) for _ in repeat(None))
    countings = chain([replace(counting, arrivals=arrivals)], again)
    # The model draws no random numbers, so there is no state to keep; and a parameter that ZeRO 3 gathers for the
    # recomputation differs in shape from its empty self at the check, not in value.
    out = checkpoint(
        lambda *given: function(next(countings), *given), *args,
        use_reentrant=False, preserve_rng_state=False, determinism_check="none",
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


class Transformer(nn.Module):
    """Layers `layers` of the model: all of them by default.

    The first stage also holds the embedding; the last one the final norm, the head and the MTP modules.

    Attributes:
        losses: of the training step that runs, for layers with losses of their own; None outside of one.
    """

    rotary: Tensor
    sp: Axis = LOCAL
    losses: LayerLosses | None = None

    def __init__(self, config: ModelConfig, layers: range | None = None):
        super().__init__()
        config.validate()
        self.config = config
        self.layer_range = range(config.num_hidden_layers) if layers is None else layers
        self.is_first = self.layer_range.start == 0
        self.is_last = self.layer_range.stop == config.num_hidden_layers
        if config.recursion_depth > 1 and not (self.is_first and self.is_last):
            raise ValueError(
                f"recursion_depth={config.recursion_depth} with layers {self.layer_range.start} to "
                f"{self.layer_range.stop - 1} of {config.num_hidden_layers}: a pipeline takes a token through its "
                "stages once. Use one pipeline stage (pp_size=1)."
            )
        if self.is_first:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in self.layer_range})
        self.recursion = build_recursion(config)
        if self.is_last:
            self.norm = build_norm(config)
            self.lm_head = Head(config.hidden_size, config.vocab_size)
            blocks = (Block(config, layer) for layer in config.mtp_layers)
            self.mtp = nn.ModuleList(MultiTokenPredictor(config, block) for block in blocks)
        self.register_buffer("rotary", rotary_table(config), persistent=False)

    def set_recompute(self, recompute: Recompute) -> None:
        """What the backward pass computes again: activation checkpointing of every block."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = recompute

    def window(self, seq_len: int) -> slice:
        """The part of every row of `seq_len` tokens that this rank computes under sequence parallelism."""
        size = seq_len // self.sp.size
        return slice(self.sp.index * size, (self.sp.index + 1) * size)

    def context(self, doc_ids: Tensor | None, seq_len: int) -> tuple[Tensor, Tensor | None]:
        """Rotation of this rank's positions [batch or 1, seq / sp, rope / 2] and mask [batch, 1, seq, seq] or None.

        Both are shared by all layers of a batch.

        Raises:
            ValueError: if the sequence is longer than `max_position_embeddings`.
        """
        longest = self.config.max_position_embeddings
        if seq_len > longest:
            raise ValueError(f"sequence of {seq_len} tokens: longer than max_position_embeddings={longest}")
        mask = visible_tokens(self.config, doc_ids, seq_len, self.rotary.device)
        if doc_ids is None:
            return self.rotary[None, self.window(seq_len)], mask
        return self.rotary[document_positions(doc_ids)[:, self.window(seq_len)]], mask

    def embed(self, tokens: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Embeddings of this rank's positions, and with MTP those of a few places more.

        Args:
            tokens: whole rows [batch, seq]. noise: [batch, seq, hidden_size], added to the embeddings.
        Returns:
            [batch, seq / sp, hidden_size] and [batch, `ahead_length`, hidden_size].
        """
        mine = self.window(tokens.shape[1])
        read = slice(mine.start, mine.start + self.ahead_length(tokens.shape[1]))
        embedded = self.embed_tokens(tokens[:, read])
        if noise is not None:
            embedded = embedded + noise[:, read]
        length = mine.stop - mine.start
        hidden = embedded[:, :length] if embedded.shape[1] > length else embedded
        return hidden, embedded if self.config.hands_embeddings_on else None

    def ahead_length(self, seq_len: int) -> int:
        """Positions of a row whose embeddings the MTP modules read here: my own and the next few, if there are any."""
        mine = self.window(seq_len)
        return min(mine.stop + self.config.num_nextn_predict_layers, seq_len) - mine.start

    def run_layers(
        self,
        hidden: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        routing: Tensor | None = None,
        real: Tensor | None = None,
        embeddings: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """This stage's blocks, `recursion_depth` times: [batch, seq / sp, hidden_size] -> same.

        Args:
            routing: [batch, seq / sp, columns] experts to use in all layers of the model (`model.moe.replay`).
            real: bool [batch, seq / sp], False for padding, which no layer's own loss and no load counts; None: all
                are tokens.
            embeddings: what `embed` gave for these positions, or more; None where `hidden` is that itself.
            tokens: ids [batch, seq / sp], which value embeddings read.
        Raises:
            ValueError: a routing of another model.
        """
        counting = Counting(real, self.losses)
        start = hidden if embeddings is None else embeddings[:, : hidden.shape[1]]
        for index, given in enumerate(split_routing(self.config, self.layer_range, routing)):
            before = hidden
            for block, experts in zip(self.layers.values(), given, strict=True):
                hidden = block(hidden, rotation, mask, experts, counting, start, tokens)
            if self.recursion is not None:
                hidden = self.recursion(before, hidden, index)
        return hidden

    def forward(self, tokens: Tensor, doc_ids: Tensor | None = None, routing: Tensor | None = None) -> Tensor:
        """Logits [batch, seq, vocab_size] of the whole model for tokens [batch, seq]; `routing` as in `run_layers`."""
        assert self.is_first and self.is_last, "a pipeline stage is driven by the engine"
        rotation, mask = self.context(doc_ids, tokens.shape[1])
        hidden = self.run_layers(self.embed_tokens(tokens), rotation, mask, routing, tokens=tokens)
        return self.lm_head(self.norm(hidden))

    def predict_ahead(
        self, hidden: Tensor, embeddings: Tensor, doc_ids: Tensor | None, real: Tensor | None = None
    ) -> list[Tensor]:
        """Hidden states of the MTP modules, depth 1 first.

        Args:
            hidden: [batch, seq / sp, hidden_size], after the final norm.
            embeddings: [batch, `ahead_length`, hidden_size] from `embed`; depth k reads them k places ahead.
            doc_ids: whole rows [batch, seq]; None for rows of one document.
            real: bool [batch, seq], False for padding; None: all are tokens. A position counts for a module where it
                has something to predict from: `tokens_ahead`.
        Returns:
            Per depth k, [batch, seq / sp, hidden_size]: position t predicts token t + k + 1. The last k positions of a
            row have no token to read and must not be trained on.
        """
        length = hidden.shape[1]
        rotation, mask = self.context(doc_ids, length * self.sp.size)
        if doc_ids is None:
            doc_ids = torch.zeros(hidden.shape[0], length * self.sp.size, dtype=torch.long, device=hidden.device)
        out = []
        for depth, module in enumerate(self.mtp, start=1):
            ahead = embeddings[:, depth : depth + length]
            past_the_end = ahead.new_zeros(ahead.shape[0], length - ahead.shape[1], ahead.shape[2])
            counted = tokens_ahead(doc_ids, real, depth)[:, self.window(doc_ids.shape[1])]
            counting = Counting(counted, self.losses)
            hidden = module(hidden, torch.cat([ahead, past_the_end], 1), rotation, mask, counting)
            out.append(hidden)
        return out


@contextmanager
def layer_losses(parts: Iterable[Transformer], scale: float) -> Iterator[LayerLosses]:
    """Forwards of these parts within compute the losses of single layers; yields what they add up to."""
    losses, parts = LayerLosses(scale), list(parts)
    for part in parts:
        part.losses = losses
    try:
        yield losses
    finally:
        for part in parts:
            part.losses = None

"""The DeepSeek-V3 decoder, whole or as one pipeline stage of consecutive layers.

A stage keeps global layer indices in its parameter names, so the stages' state dicts together are the model's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention.core import document_mask, document_positions
from model.attention.mla import MultiHeadLatentAttention
from model.config import ModelConfig
from model.layers.feed_forward import FeedForward
from model.layers.norm import RMSNorm
from model.layers.rope import rotary_table
from model.moe.experts import MixtureOfExperts
from model.mtp import MultiTokenPredictor


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals; routed experts from layer `first_k_dense_replace` on."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = FeedForward(config.hidden_size, config.intermediate_size)
        self.mlp: nn.Module = MixtureOfExperts(config) if config.is_moe_layer(layer) else dense

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Layers `layers` of the model: all of them by default.

    The first stage also holds the embedding; the last one the final norm, the head and the MTP modules.
    """

    rotary: Tensor

    def __init__(self, config: ModelConfig, layers: range | None = None):
        super().__init__()
        config.validate()
        self.config = config
        self.layer_range = range(config.num_hidden_layers) if layers is None else layers
        self.is_first = self.layer_range.start == 0
        self.is_last = self.layer_range.stop == config.num_hidden_layers
        if self.is_first:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in self.layer_range})
        if self.is_last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            depths = config.num_nextn_predict_layers
            blocks = (Block(config, config.num_hidden_layers + k) for k in range(depths))
            self.mtp = nn.ModuleList(MultiTokenPredictor(config, block) for block in blocks)
        self.register_buffer("rotary", rotary_table(config), persistent=False)

    def context(self, doc_ids: Tensor | None, seq_len: int) -> tuple[Tensor, Tensor | None]:
        """Rotation [batch or 1, seq, rope/2] and mask [batch, 1, seq, seq] or None, shared by all layers of a batch.

        Raises:
            ValueError: if the sequence is longer than `max_position_embeddings`.
        """
        longest = self.config.max_position_embeddings
        if seq_len > longest:
            raise ValueError(f"sequence of {seq_len} tokens: longer than max_position_embeddings={longest}")
        if doc_ids is None:
            return self.rotary[None, :seq_len], None
        return self.rotary[document_positions(doc_ids)], document_mask(doc_ids)

    def run_layers(self, hidden: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """This stage's blocks: [batch, seq, hidden_size] -> same."""
        for block in self.layers.values():
            hidden = block(hidden, rotation, mask)
        return hidden

    def forward(self, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """Logits [batch, seq, vocab_size] of the whole model for tokens [batch, seq]."""
        assert self.is_first and self.is_last, "a pipeline stage is driven by the engine"
        rotation, mask = self.context(doc_ids, tokens.shape[1])
        return self.lm_head(self.norm(self.run_layers(self.embed_tokens(tokens), rotation, mask)))

    def predict_ahead(self, hidden: Tensor, embeddings: Tensor, doc_ids: Tensor | None) -> list[Tensor]:
        """Hidden states of the MTP modules, depth 1 first.

        Args:
            hidden: [batch, seq, hidden_size], after the final norm.
            embeddings: [batch, seq, hidden_size] of the same tokens; depth k reads them k places ahead.
        Returns:
            Per depth k, [batch, seq, hidden_size]: position t predicts token t + k + 1. The last k positions have no
            token to read and must not be trained on.
        """
        rotation, mask = self.context(doc_ids, hidden.shape[1])
        out = []
        for module in self.mtp:
            embeddings = torch.cat([embeddings[:, 1:], torch.zeros_like(embeddings[:, :1])], 1)
            hidden = module(hidden, embeddings, rotation, mask)
            out.append(hidden)
        return out

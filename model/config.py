"""The architecture as data, under Hugging Face's key names where there are any. Does not import torch.

Papers: DeepSeek-V3 (arXiv:2412.19437), V3.2 (arXiv:2512.02556) for DSA, V2 (arXiv:2405.04434) for its router. Counts
are analytic; tests hold them against built models. What cannot be built is in `model.config_rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from model.config_rules import VALUE_GATE_FEATURES, check

Attention = Literal["mla", "dsa", "mha", "gqa", "mqa", "sliding"]
GROUPED = ("mha", "gqa", "mqa", "sliding")  # keys and values per head, no latent


@dataclass
class RopeScaling:
    """YaRN (arXiv:2309.00071), with the keys DeepSeek writes into config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


OWN = {"hf": False}  # a key that no published config.json has


@dataclass
class ModelConfig:
    """Hyper-parameters. Widths are in features, counts are `num_*` or HF's own `n_*`.

    Attributes:
        attention: mla; dsa (MLA that reads `index_topk` tokens chosen by an indexer); mha, gqa, mqa; sliding (MHA or
            GQA over the last `sliding_window` tokens and every `global_stride`-th before them).
        num_key_value_heads: of gqa and sliding; default: as many as heads. mha and mqa decide it themselves.
        head_dim: of mha, gqa, mqa, sliding. The latent kinds have qk_nope_head_dim, qk_rope_head_dim, v_head_dim.
        position: rope, or cope (contextual, arXiv:2405.18719) with at most `cope_positions` of them.
        norm: rmsnorm, or dyt (dynamic tanh, arXiv:2503.10622).
        scoring_func, topk_method: the router of V3 is sigmoid and noaux_tc, of V2 softmax and (group_limited_)greedy.
        aux_loss_alpha: weight of the balancing loss; seq_aux: balanced within every sequence, or over the batch.
        recursion_depth: times the stack of layers is applied (arXiv:2510.04871).
        residual_scales: a block reads learned shares of the stream and of the embedding (`model.layers.residual`).
        value_embeddings: every second layer adds a vector of the token's own to its values (`model.layers.values`).
        initialisation: of matrices: fixed, the deviation `initializer_range` whatever their width; fan_in, one over the
            square root of the features read, so that every width starts alike (arXiv:2203.03466, table 3).
        embedding_init, head_init: deviations of the embedding and the head; default: `initializer_range`.
        zero_init_outputs: projections that write into the residual stream start at zero, so that every block
            does nothing at first (arXiv:1901.09321, §4). Of the four none changes the architecture.
    """

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    moe_intermediate_size: int = 96
    num_hidden_layers: int = 6
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int | None = 64
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 24
    qk_rope_head_dim: int = 8
    v_head_dim: int = 32
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    aux_loss_alpha: float = 0.0
    seq_aux: bool = True
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    router_bias_update_rate: float = field(default=1e-3, metadata=OWN)
    attention: Attention = field(default="mla", metadata=OWN)
    num_key_value_heads: int | None = None
    head_dim: int = field(default=32, metadata=OWN)
    sliding_window: int = field(default=64, metadata=OWN)
    global_stride: int = field(default=16, metadata=OWN)
    index_n_heads: int = 4
    index_head_dim: int = 32
    index_topk: int = 64
    position: Literal["rope", "cope"] = field(default="rope", metadata=OWN)
    cope_positions: int = field(default=64, metadata=OWN)
    norm: Literal["rmsnorm", "dyt"] = field(default="rmsnorm", metadata=OWN)
    recursion_depth: int = field(default=1, metadata=OWN)
    residual_scales: bool = field(default=False, metadata=OWN)
    value_embeddings: bool = field(default=False, metadata=OWN)
    initialisation: Literal["fixed", "fan_in"] = field(default="fixed", metadata=OWN)
    embedding_init: float | None = field(default=None, metadata=OWN)
    head_init: float | None = field(default=None, metadata=OWN)
    zero_init_outputs: bool = field(default=False, metadata=OWN)

    @property
    def is_latent(self) -> bool:
        """Whether keys and values are expanded from a latent: MLA and DSA."""
        return self.attention not in GROUPED

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head; of a latent kind the part without position plus the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_latent else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of one value head."""
        return self.v_head_dim if self.is_latent else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Features of a query or key that turn with position."""
        return self.qk_rope_head_dim if self.is_latent else self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """Heads that have keys and values of their own."""
        if self.attention == "mqa":
            return 1
        if self.attention in ("gqa", "sliding"):
            return self.num_key_value_heads or self.num_attention_heads
        return self.num_attention_heads

    def is_moe_layer(self, layer: int) -> bool:
        """Whether global layer index `layer`, perhaps of `mtp_layers`, routes to experts."""
        return layer >= self.first_k_dense_replace

    def has_value_embedding(self, layer: int) -> bool:
        """Whether global layer index `layer` adds one to its values: every second layer, the last among them."""
        before_last = self.num_hidden_layers - 1 - layer
        return self.value_embeddings and before_last >= 0 and before_last % 2 == 0

    @property
    def value_table_params(self) -> int:
        """Weights of one value embedding's table."""
        return self.vocab_size * self.num_kv_heads * self.value_head_dim

    @property
    def mtp_layers(self) -> range:
        """Global layer indices of the MTP modules' blocks: they go on behind the last layer."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    @property
    def hands_embeddings_on(self) -> bool:
        """Whether later layers read the embeddings too: MTP modules, and learned scales of the residual stream."""
        return self.num_nextn_predict_layers > 0 or self.residual_scales

    def validate(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: naming the key, its value and the legal range.
        """
        check(self)

    def attention_params(self) -> int:
        """Weights of one attention block; of MLA (§2.1.1, eqs. 1-11) with its two latent norms."""
        heads, hidden = self.num_attention_heads, self.hidden_size
        cope = self.cope_positions * self.qk_head_dim if self.position == "cope" else 0
        if not self.is_latent:
            return (2 * heads + 2 * self.num_kv_heads) * self.head_dim * hidden + cope
        if self.q_lora_rank is None:
            query = hidden * heads * self.qk_head_dim
        else:
            query = hidden * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * heads * self.qk_head_dim
        latent = hidden * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        expand = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        indexer = 0
        if self.attention == "dsa":
            assert self.q_lora_rank is not None
            indexer = self.index_n_heads * (self.q_lora_rank * self.index_head_dim + hidden)
            indexer += self.index_head_dim * (hidden + 2)  # its key's norm has a bias
        return query + latent + expand + heads * self.v_head_dim * hidden + indexer + cope

    def _ffn_params(self, layer: int, *, active: bool) -> int:
        if not self.is_moe_layer(layer):
            return 3 * self.hidden_size * self.intermediate_size
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        routed = self.num_experts_per_tok if active else self.n_routed_experts
        return expert * (routed + self.n_shared_experts) + self.n_routed_experts * self.hidden_size

    def norm_params(self) -> int:
        """Weights of one norm: RMSNorm's weight; of DyT weight, bias and alpha."""
        return self.hidden_size if self.norm == "rmsnorm" else 2 * self.hidden_size + 1

    def recursion_params(self) -> int:
        """Weights of the adaptive residual scaling between passes through the stack."""
        return self.recursion_depth * self.hidden_size if self.recursion_depth > 1 else 0

    def layer_params(self, layer: int, *, active: bool = False) -> int:
        """Weights of one block; with `active`, only those one token passes through."""
        extra = 2 if self.residual_scales and layer < self.num_hidden_layers else 0
        if self.has_value_embedding(layer):
            extra += self.value_table_params // (self.vocab_size if active else 1)
            extra += self.num_kv_heads * VALUE_GATE_FEATURES
        return self.attention_params() + self._ffn_params(layer, active=active) + 2 * self.norm_params() + extra

    def tail_params(self) -> int:
        """Active weights that follow the last layer: the head, once more per MTP module, and those modules' blocks."""
        blocks = sum(self.layer_params(layer, active=True) + 2 * self.hidden_size**2 for layer in self.mtp_layers)
        return blocks + (1 + len(self.mtp_layers)) * self.vocab_size * self.hidden_size

    def num_params(self, *, active: bool = False, mtp: bool = True) -> int:
        """Trained weights: embedding and head counted once each, MTP modules if asked (they share both)."""
        total = sum(self.layer_params(layer, active=active) for layer in range(self.num_hidden_layers))
        total += 2 * self.vocab_size * self.hidden_size + self.norm_params() + self.recursion_params()
        if mtp:
            joined = 2 * self.hidden_size**2 + 3 * self.norm_params()
            total += sum(self.layer_params(layer, active=active) + joined for layer in self.mtp_layers)
        return total

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of forward and backward per token: 6 per active weight plus causal attention."""
        weights = self.num_params(active=True) - self.vocab_size * self.hidden_size
        weights += self.num_nextn_predict_layers * self.vocab_size * self.hidden_size
        again = self.recursion_depth - 1  # passes through the stack after the first; MTP modules run once
        weights += again * sum(self.layer_params(layer, active=True) for layer in range(self.num_hidden_layers))
        layers = self.num_hidden_layers * self.recursion_depth + self.num_nextn_predict_layers
        attention = layers * self.num_attention_heads * (self.qk_head_dim + self.value_head_dim)
        attention *= self.attended_tokens(seq_len)
        if self.position == "cope":  # every head multiplies its queries with the table, which counts as one weight
            attention += layers * (self.num_attention_heads - 1) * self.cope_positions * self.qk_head_dim
        if self.attention == "dsa":  # index scores of all tokens before, and a loss on those that are read
            scored = (seq_len // 2 + 2 * self.attended_tokens(seq_len)) // 3
            attention += layers * self.index_n_heads * self.index_head_dim * scored
        return 6 * (weights + attention)

    def attended_tokens(self, seq_len: int) -> int:
        """How many tokens a query of a row reads on average: half of them, or what sparse attention leaves of them."""
        if self.attention == "dsa" and seq_len > self.index_topk:
            return self.index_topk * (2 * seq_len - self.index_topk + 1) // (2 * seq_len)
        beyond = seq_len - self.sliding_window  # queries whose window does not reach the first token
        if self.attention != "sliding" or beyond <= 0:
            return seq_len // 2
        rounds, rest = divmod(beyond, self.global_stride)
        strided = self.global_stride * rounds * (rounds + 1) // 2 + rest * (rounds + 1)
        window = self.sliding_window * (self.sliding_window + 1) // 2 + beyond * self.sliding_window
        return (window + strided) // seq_len

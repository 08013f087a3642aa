"""The architecture as data, under Hugging Face's `DeepseekV3Config` key names. Does not import torch.

Paper: DeepSeek-V3 (arXiv:2412.19437). Counts are analytic; tests hold them against built models.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RopeScaling:
    """YaRN (arXiv:2309.00071), with the keys DeepSeek writes into config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass
class ModelConfig:
    """DeepSeek-V3 hyper-parameters. Widths are in features, counts are `num_*` or HF's own `n_*`.

    Raises:
        ValueError: from `validate`, naming the key, its value and the legal range.
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
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    router_bias_update_rate: float = field(default=1e-3, metadata={"hf": False})

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without position plus the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether global layer index `layer` routes to experts. MTP layers (index >= num_hidden_layers) always do."""
        return layer >= self.first_k_dense_replace

    def validate(self) -> None:
        """Refuse what cannot be built."""
        for name in (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
            "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok "
            "max_position_embeddings"
        ).split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim}: rotary features come in pairs; make it even")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group={self.n_group}: must divide n_routed_experts={self.n_routed_experts}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group={self.topk_group}: must be between 1 and n_group={self.n_group}")
        allowed = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > allowed:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok}: only {allowed} experts can be chosen with "
                f"n_routed_experts={self.n_routed_experts}, n_group={self.n_group}, topk_group={self.topk_group}"
            )
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError(f"n_group={self.n_group}: a group's score sums its top 2 experts; use groups of 2 or more")
        if self.first_k_dense_replace < 0 or self.num_nextn_predict_layers < 0 or self.n_shared_experts < 0:
            raise ValueError("first_k_dense_replace, num_nextn_predict_layers, n_shared_experts: must not be negative")

    def attention_params(self) -> int:
        """Weights of one MLA block (§2.1.1, eqs. 1-11), its two latent norms included."""
        heads, hidden = self.num_attention_heads, self.hidden_size
        if self.q_lora_rank is None:
            query = hidden * heads * self.qk_head_dim
        else:
            query = hidden * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * heads * self.qk_head_dim
        latent = hidden * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        expand = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + latent + expand + heads * self.v_head_dim * hidden

    def _ffn_params(self, layer: int, *, active: bool) -> int:
        if not self.is_moe_layer(layer):
            return 3 * self.hidden_size * self.intermediate_size
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        routed = self.num_experts_per_tok if active else self.n_routed_experts
        return expert * (routed + self.n_shared_experts) + self.n_routed_experts * self.hidden_size

    def layer_params(self, layer: int, *, active: bool = False) -> int:
        """Weights of one block; with `active`, only those one token passes through."""
        return self.attention_params() + self._ffn_params(layer, active=active) + 2 * self.hidden_size

    def tail_params(self) -> int:
        """Active weights that follow the last layer: the head, once more per MTP module, and those modules' blocks."""
        block = self.layer_params(self.num_hidden_layers, active=True) + 2 * self.hidden_size**2
        depths = self.num_nextn_predict_layers
        return depths * block + (1 + depths) * self.vocab_size * self.hidden_size

    def num_params(self, *, active: bool = False, mtp: bool = True) -> int:
        """Trained weights: embedding and head counted once each, MTP modules if asked (they share both)."""
        total = sum(self.layer_params(layer, active=active) for layer in range(self.num_hidden_layers))
        total += 2 * self.vocab_size * self.hidden_size + self.hidden_size
        if mtp:
            block = self.layer_params(self.num_hidden_layers, active=active)
            total += self.num_nextn_predict_layers * (block + 2 * self.hidden_size**2 + 3 * self.hidden_size)
        return total

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of forward and backward per token: 6 per active weight plus causal attention."""
        weights = self.num_params(active=True) - self.vocab_size * self.hidden_size
        weights += self.num_nextn_predict_layers * self.vocab_size * self.hidden_size
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        attention = layers * self.num_attention_heads * (self.qk_head_dim + self.v_head_dim) * seq_len // 2
        return 6 * (weights + attention)

    def to_hf(self) -> dict[str, Any]:
        """The keys Hugging Face's `DeepseekV3Config`, vLLM and llama.cpp read from config.json."""
        out = {k: v for k, v in asdict(self).items() if k not in ("router_bias_update_rate", "rope_scaling")}
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            scaling = asdict(self.rope_scaling)
            out["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **scaling}
            rope = {"rope_type": "yarn", "rope_theta": self.rope_theta, **scaling}
        return out | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": self.num_attention_heads,
            "num_local_experts": self.n_routed_experts,
            "rope_parameters": rope,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
        }

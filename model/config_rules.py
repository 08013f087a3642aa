"""What of an architecture cannot be built: each rule by key, value and legal range. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:
    from model.config import ModelConfig

_AT_LEAST_ONE = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok "
    "max_position_embeddings head_dim sliding_window global_stride index_n_heads index_head_dim index_topk "
    "cope_positions recursion_depth"
).split()
_NOT_NEGATIVE = ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts", "aux_loss_alpha")
_NAMES = ("attention", "position", "norm", "scoring_func", "topk_method")


def check(config: ModelConfig) -> None:
    """Refuse what cannot be built.

    Raises:
        ValueError: naming the key, its value and the legal range.
    """
    for name in _AT_LEAST_ONE:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least 1")
    for name in _NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)}: must not be negative")
    kinds = get_type_hints(type(config))
    for name in _NAMES:
        if getattr(config, name) not in get_args(kinds[name]):
            raise ValueError(f"{name}={getattr(config, name)}: must be one of {', '.join(get_args(kinds[name]))}")
    _check_attention(config)
    _check_router(config)


def _check_attention(config: ModelConfig) -> None:
    if config.rotary_dim % 2:
        key = "qk_rope_head_dim" if config.is_latent else "head_dim"
        raise ValueError(f"{key}={config.rotary_dim}: rotary features come in pairs; make it even")
    given, decided = config.num_key_value_heads, {"mha": config.num_attention_heads, "mqa": 1}
    if given is not None and config.attention in decided and given != decided[config.attention]:
        raise ValueError(
            f"num_key_value_heads={given} with attention={config.attention}: it has {decided[config.attention]}; leave "
            "the key away, or use attention=gqa"
        )
    if given is not None and given < 1:
        raise ValueError(f"num_key_value_heads={given}: must be at least 1")
    if config.num_attention_heads % config.num_kv_heads:
        raise ValueError(
            f"num_key_value_heads={config.num_kv_heads}: must divide num_attention_heads={config.num_attention_heads}"
        )
    if config.attention == "dsa":
        if config.q_lora_rank is None:
            raise ValueError("q_lora_rank=None with attention=dsa: the indexer reads the query latent; set a rank")
        if config.index_head_dim < config.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim={config.index_head_dim}: must be at least qk_rope_head_dim={config.qk_rope_head_dim}, "
                "the part of it that turns with position"
            )
    if config.position == "cope" and config.rope_scaling is not None:
        raise ValueError(
            "rope_scaling with position=cope: there are no rotary positions to stretch; leave it away, or use "
            "position=rope"
        )
    if config.position == "cope" and config.attention in ("dsa", "sliding"):
        raise ValueError(
            f"position=cope with attention={config.attention}: a contextual position counts over all tokens before, "
            "which this attention does not read; use mla, mha, gqa or mqa, or position=rope"
        )


def _check_router(config: ModelConfig) -> None:
    if config.n_routed_experts % config.n_group:
        raise ValueError(f"n_group={config.n_group}: must divide n_routed_experts={config.n_routed_experts}")
    if not 1 <= config.topk_group <= config.n_group:
        raise ValueError(f"topk_group={config.topk_group}: must be between 1 and n_group={config.n_group}")
    allowed = config.n_routed_experts // config.n_group * config.topk_group
    if config.topk_method == "greedy":  # takes no notice of groups
        allowed = config.n_routed_experts
    if config.num_experts_per_tok > allowed:
        raise ValueError(
            f"num_experts_per_tok={config.num_experts_per_tok}: only {allowed} experts can be chosen with "
            f"n_routed_experts={config.n_routed_experts}, n_group={config.n_group}, topk_group={config.topk_group}"
        )
    if config.topk_method == "noaux_tc" and config.n_group > 1 and config.n_routed_experts // config.n_group < 2:
        raise ValueError(f"n_group={config.n_group}: a group's score sums its top 2 experts; use groups of 2 or more")

"""What of an architecture cannot be built: each rule by key, value and legal range. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args, get_type_hints

if TYPE_CHECKING:
    from model.config import ModelConfig

VALUE_GATE_FEATURES = 12  # of the stream, that the gate of a value embedding reads
_WIDTHS = (
    "hidden_size intermediate_size moe_intermediate_size kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim head_dim index_head_dim"
).split()
_COUNTS = (
    "num_attention_heads num_key_value_heads n_routed_experts num_experts_per_tok n_group topk_group index_n_heads"
).split()
_POSITIONS = "max_position_embeddings sliding_window global_stride index_topk cope_positions".split()
# Name -> smallest and largest value. The largest lie far beyond any model that was ever built; what is larger would be
# counted, planned and allocated forever.
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_WIDTHS, (1, 1 << 20)),
    **dict.fromkeys(_COUNTS, (1, 1 << 16)),
    **dict.fromkeys(_POSITIONS, (1, 1 << 27)),
    "vocab_size": (1, 1 << 24),
    "num_hidden_layers": (1, 2000),
    "first_k_dense_replace": (0, 2000),
    "num_nextn_predict_layers": (0, 64),
    "n_shared_experts": (0, 1024),
    "recursion_depth": (1, 256),
    "routed_scaling_factor": (1e-3, 1e3),
    "aux_loss_alpha": (0, 1e3),
    "rope_theta": (1, 1e12),
    "rms_norm_eps": (1e-20, 1),
    "initializer_range": (1e-9, 10),
    "embedding_init": (1e-9, 10),
    "head_init": (1e-9, 10),
    "router_bias_update_rate": (0, 1),
}
SCALING_BOUNDS: dict[str, tuple[float, float]] = {
    "factor": (1, 1e6),
    "original_max_position_embeddings": (1, 1 << 27),
    "beta_fast": (0, 1e6),
    "beta_slow": (0, 1e6),
    "mscale": (0, 1e3),
    "mscale_all_dim": (0, 1e3),
}
_NAMES = ("attention", "position", "norm", "scoring_func", "topk_method", "initialisation")


def check(config: ModelConfig) -> None:
    """Refuse what cannot be built.

    Raises:
        ValueError: naming the key, its value and the legal range.
    """
    for name, bounds in BOUNDS.items():
        _check_bounds(name, getattr(config, name), bounds)
    if config.rope_scaling is not None:
        for name, bounds in SCALING_BOUNDS.items():
            _check_bounds(f"rope_scaling.{name}", getattr(config.rope_scaling, name), bounds)
    kinds = get_type_hints(type(config))
    for name in _NAMES:
        if getattr(config, name) not in get_args(kinds[name]):
            given = str(getattr(config, name))[:60]
            raise ValueError(f"{name}={given}: must be one of {', '.join(get_args(kinds[name]))}")
    _check_attention(config)
    _check_router(config)


def _check_bounds(name: str, value: float | None, bounds: tuple[float, float]) -> None:
    if value is None or bounds[0] <= value <= bounds[1]:
        return
    if value > bounds[1]:
        raise ValueError(f"{name}={value}: must be at most {bounds[1]:g}")
    raise ValueError(f"{name}={value}: must be " + (f"at least {bounds[0]:g}" if bounds[0] else "0 or more"))


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
    if config.value_embeddings and config.hidden_size < VALUE_GATE_FEATURES:
        raise ValueError(
            f"hidden_size={config.hidden_size} with value_embeddings: their gate reads {VALUE_GATE_FEATURES} features; "
            "make it wider, or omit value_embeddings"
        )
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
            "rope_scaling with position=cope: there are no rotary positions to stretch; omit it, or use position=rope"
        )
    if config.position == "cope" and config.attention in ("dsa", "sliding"):
        raise ValueError(
            f"position=cope with attention={config.attention}: a contextual position counts over all tokens before, "
            "which this attention does not read; use mla, mha, gqa or mqa, or position=rope"
        )


def _check_router(config: ModelConfig) -> None:
    if config.n_routed_experts % config.n_group:
        raise ValueError(f"n_group={config.n_group}: must divide n_routed_experts={config.n_routed_experts}")
    if config.topk_group > config.n_group:
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

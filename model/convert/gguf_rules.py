"""Which models llama.cpp's `deepseek2` and `deepseek32` can hold. No torch: checked before anything starts."""

from __future__ import annotations

from model.config import ModelConfig

# Of fewer index heads all may say nothing of a token. Many scores are exactly 0 then, and which of the equal ones are
# read is llama.cpp's choice, another than training's. Found by comparison: with 16 all log-probabilities are the same.
TIE_FREE_HEADS = 16
HADAMARD = 64  # features of the smallest rotation that llama.cpp has for an indexer's queries and keys
LITE_LAYERS = (26, 27)  # how llama.cpp's deepseek2 loader recognises models without q_lora_rank


def gguf_architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture."""
    return "deepseek32" if config.attention == "dsa" else "deepseek2"


def gguf_gap(config: ModelConfig) -> str | None:
    """What of the architecture llama.cpp has no place for; None where it has all. Such models get no GGUF file."""
    known = {"attention": ("mla", "dsa"), "position": ("rope",), "norm": ("rmsnorm",), "recursion_depth": (1,),
             "residual_scales": (False,), "value_embeddings": (False,)}  # fmt: skip
    for key, values in known.items():
        if getattr(config, key) not in values:
            return f"llama.cpp's deepseek2 has no {key}={getattr(config, key)}"
    if config.topk_method == "noaux_tc" and config.scoring_func == "softmax":
        return "llama.cpp's deepseek2 has no scoring_func=softmax with topk_method=noaux_tc"
    if config.topk_method == "group_limited_greedy" and config.topk_group < config.n_group:
        # It scores a group by the sum of its two best experts, as V3 does; V2 takes the best one.
        return "llama.cpp's deepseek2 has no topk_method=group_limited_greedy"
    dim = config.index_head_dim
    if config.attention == "dsa" and (dim < HADAMARD or dim & (dim - 1)):
        # It would not refuse the file but end the process that loads it: ggml.c, GGML_ASSERT(ggml_can_mul_mat(a, b)).
        return (
            f"llama.cpp's deepseek32 turns index heads of 2^n features, {HADAMARD} at least, and this model has "
            f"index_head_dim={dim}"
        )
    if config.attention == "dsa" and _reads_some(config) and config.index_n_heads < TIE_FREE_HEADS:
        return (
            f"llama.cpp's deepseek32 reads other tokens than training did where index scores are equal, as they often "
            f"are with index_n_heads={config.index_n_heads} (from {TIE_FREE_HEADS} on they are not)"
        )
    return None


def _reads_some(config: ModelConfig) -> bool:
    return config.index_topk < config.max_position_embeddings


def check_gguf(config: ModelConfig) -> None:
    """Refuse what llama.cpp would not load or would compute differently.

    Raises:
        ValueError: with the way out.
    """
    if gap := gguf_gap(config):
        raise ValueError(f"{gap}. Set export.gguf=[].")
    scaling = config.rope_scaling
    if scaling is not None and scaling.mscale != scaling.mscale_all_dim:
        raise ValueError(
            f"rope_scaling.mscale={scaling.mscale} differs from mscale_all_dim={scaling.mscale_all_dim}: "
            "GGUF has one number for both. Make them equal, or set export.gguf=[]."
        )
    if config.attention == "mla" and (config.q_lora_rank is None) != (config.num_hidden_layers in LITE_LAYERS):
        raise ValueError(
            f"q_lora_rank={config.q_lora_rank} with num_hidden_layers={config.num_hidden_layers}: "
            f"llama.cpp takes models of {' or '.join(map(str, LITE_LAYERS))} layers for DeepSeek-V2-Lite, "
            "which alone has no q_lora_rank. Change one of the two, or set export.gguf=[]."
        )

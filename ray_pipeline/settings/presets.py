"""Model sizes by name: the architecture, the student's, and the learning rates that go with the width.

Vocabulary, context and everything else of training belong to the recipe.

Widths follow DeepSeek-V3's proportions (arXiv:2412.19437): a latent for keys and values, one shared expert beside many
small routed ones, a first dense layer, one multi-token-prediction module. Counts are with 32k entries of vocabulary.
"""

from __future__ import annotations

from typing import Any

from ray_pipeline.settings.schema import TRAINING_STAGES

PRESETS: dict[str, dict[str, Any]] = {
    # 1.3M at 512 entries: learns on two CPU cores in minutes
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 6,
        "first_k_dense_replace": 1,
        "num_attention_heads": 8,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 1,
        # 1/sqrt(hidden_size): at 0.02 a model this narrow learns several times slower.
        "initializer_range": 0.09,
    },
    # 127M, 71M active: one 24 GB GPU
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 12,
        "first_k_dense_replace": 1,
        "num_attention_heads": 8,
        "q_lora_rank": 256,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.04,
    },
    # 1.2B, 0.3B active: one 80 GB GPU
    "medium": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 20,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "q_lora_rank": 512,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.03,
    },
    # 6.7B, 1.6B active: eight 80 GB GPUs
    "large": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": 24,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "q_lora_rank": 1024,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 40,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.02,
    },
}
# Fewer layers, and for the smallest fewer units: at most half of the teacher's parameters.
STUDENTS: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 3, "moe_intermediate_size": 48, "intermediate_size": 192},
    "small": {"num_hidden_layers": 5, "moe_intermediate_size": None, "intermediate_size": None},
    "medium": {"num_hidden_layers": 9, "moe_intermediate_size": None, "intermediate_size": None},
    "large": {"num_hidden_layers": 11, "moe_intermediate_size": None, "intermediate_size": None},
}
# pretrain, sft, dpo, grpo, distillation
LEARNING_RATES: dict[str, tuple[float, float, float, float, float]] = {
    "tiny": (5e-3, 3e-3, 3e-4, 1e-4, 2e-3),
    "small": (8e-4, 2e-4, 2e-5, 3e-5, 4e-4),
    "medium": (6e-4, 1e-4, 5e-6, 1e-5, 2e-4),
    "large": (4e-4, 5e-5, 1e-6, 5e-6, 1e-4),
}


def preset(size: str) -> dict[str, Any]:
    """The settings of a size, nested as in a recipe.

    Raises:
        KeyError: no such size.
    """
    rates = zip(TRAINING_STAGES, LEARNING_RATES[size], strict=True)
    settings: dict[str, Any] = {stage: {"optimizer": {"lr": rate}} for stage, rate in rates}
    settings["distillation"]["student"] = dict(STUDENTS[size])
    return {"model": dict(PRESETS[size]), **settings}

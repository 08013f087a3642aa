"""Model sizes by name. A preset sets the architecture alone: vocabulary, context and training belong to the recipe.

Widths follow DeepSeek-V3's proportions (arXiv:2412.19437): a latent for keys and values, one shared expert beside many
small routed ones, a first dense layer, one multi-token-prediction module. Counts are with 32k entries of vocabulary.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # 2.6M (1.3M active) at 512 entries: learns on two CPU cores in minutes
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 6,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 1,
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
    },
}

"""Predicted activations are the tensors that autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.layers.rope import rotary_table
from model.parallel.mesh import Mesh, MeshSizes
from model.parallel.shard import build_part
from model.transformer import Block
from ray_pipeline.costs.activations import cast_weights, kernels, layer_bytes, logits_bytes, num_heads, part_bytes
from ray_pipeline.costs.weights import layer_weights
from ray_pipeline.costs.workload import Workload
from ray_pipeline.data.batch import Batch
from ray_pipeline.engine.engine import Parts
from ray_pipeline.layout import Layout
from ray_pipeline.objectives.cross_entropy import CrossEntropy

CHECKPOINTING = ("none", "selective", "full")
SMALL = ModelConfig(
    vocab_size=64, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=4,
    first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=40, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip
MODELS = {
    "small": SMALL,
    "queries without a latent": replace(SMALL, q_lora_rank=None),
    "values as wide as queries": replace(SMALL, v_head_dim=12),
    "no shared experts": replace(SMALL, n_shared_experts=0),
    "two shared experts, three chosen": replace(SMALL, n_shared_experts=2, num_experts_per_tok=3),
    "grouped routing": replace(SMALL, n_routed_experts=8, n_group=2),
    "weights not normalised": replace(SMALL, norm_topk_prob=False),
}


def kept_bytes(model: ModelConfig, layer: int, bf16: bool, recompute: Any) -> int:
    """Bytes of the distinct storages that one block's graph keeps, parameters and what layers share left out."""
    block, rows, seq = Block(model, layer), 2, 32
    block.recompute = recompute
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(rows, seq, model.hidden_size, requires_grad=True)
    rotation, mask = rotary_table(model)[None, :seq], torch.ones(rows, 1, seq, seq, dtype=torch.bool).tril()
    shared = {t.untyped_storage().data_ptr() for t in (*block.parameters(), rotation, mask)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in shared:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        block(x, rotation, mask)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def of(model: ModelConfig, bf16: bool, **layout: Any) -> Workload:
    return Workload("pretrain", model, Layout(**layout), rows=2, seq_len=32, micro_batch=2, steps=1, bf16=bf16)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize("name", MODELS)
def test_a_block_keeps_what_the_formula_says(name: str, layer: int, bf16: bool) -> None:
    model = MODELS[name]
    work = of(model, bf16)
    weights = cast_weights(work, layer_weights(model, layer))
    assert layer_bytes(work, kernels("cpu"), layer) + weights == kept_bytes(model, layer, bf16, "none")


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_selective_checkpointing_keeps_the_feed_forward_alone(bf16: bool) -> None:
    work = of(SMALL, bf16, activation_checkpointing="selective")
    weights = cast_weights(work, (w for w in layer_weights(SMALL, 1) if w.kind != "attention"))
    mask = 2 * 32 * 32  # kept by the checkpoint as its argument; layers share it, so `part_bytes` counts it
    kept = kept_bytes(SMALL, 1, bf16, "selective")
    assert kept in (predicted := layer_bytes(work, kernels("cpu"), 1) + weights, predicted + mask)


def test_checkpointing_keeps_less_and_less() -> None:
    sizes = [layer_bytes(of(SMALL, False, activation_checkpointing=c), kernels("cpu"), 1) for c in CHECKPOINTING]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 2 * 32 * SMALL.hidden_size * 4


def last_part_bytes(bf16: bool, mtp_weight: float) -> int:
    """Like `kept_bytes`, for the whole model with its loss."""
    parts = Parts([build_part(SMALL, range(SMALL.num_hidden_layers), Mesh(MeshSizes())).train()], None)
    parts.autocast_dtype = torch.bfloat16 if bf16 else None
    tokens = torch.randint(0, SMALL.vocab_size, (2, 32))
    batch = Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens))
    shared = {t.untyped_storage().data_ptr() for t in (*parts.parameters(), parts.parts[0].rotary, tokens)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in shared:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parts(0, [], batch, CrossEntropy(mtp_weight))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("mtp_weight", [0.0, 0.3])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_whole_model_with_its_loss_keeps_what_the_formula_says(bf16: bool, mtp_weight: float) -> None:
    work = replace(of(SMALL, bf16), trains_mtp=mtp_weight > 0)
    predicted = part_bytes(work, kernels("cpu"), work.parts[0]) + num_heads(work) * logits_bytes(work)
    # The last token of a row has no label two places on, which the formula leaves out of account.
    assert predicted == pytest.approx(last_part_bytes(bf16, mtp_weight), rel=2e-3)

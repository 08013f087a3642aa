"""Predicted activations are the tensors that autograd really keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.attention.kinds import visible_tokens
from model.build import build_part
from model.config import ModelConfig
from model.kernels.cpu import blocked, products
from model.kernels.cuda import fused_attention
from model.kernels.limits import LONGEST, row_step
from model.kernels.operations import OVERRIDES
from model.layers.auxiliary import EVERY_TOKEN, Counting, LayerLosses
from model.layers.rope import rotary_table
from model.parallel.mesh import Mesh, MeshSizes
from model.transformer import Block, layer_losses
from ray_pipeline.costs import activations
from ray_pipeline.costs.activations import cast_weights, layer_bytes, part_bytes
from ray_pipeline.costs.head_loss import kept_bytes as kept_by_loss
from ray_pipeline.costs.kernels import expected_rows, kernels
from ray_pipeline.costs.weights import layer_weights
from ray_pipeline.costs.workload import Workload
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.pipeline.parts import Parts
from ray_pipeline.layout.layout import Layout
from ray_pipeline.objectives.cross_entropy import CrossEntropy

CHECKPOINTING = ("none", "selective", "full")
SMALL = ModelConfig(
    vocab_size=64, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=4,
    first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=40, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip
MHA = replace(SMALL, attention="mha", head_dim=12, sliding_window=5, cope_positions=7)
GQA = replace(MHA, attention="gqa", num_key_value_heads=2)
MODELS = {
    "small": SMALL,
    "grouped attention": GQA,
    "multi-head attention": MHA,
    "one key head": replace(MHA, attention="mqa"),
    "sliding": replace(GQA, attention="sliding"),
    "contextual positions": replace(SMALL, position="cope", cope_positions=7),
    "contextual positions, grouped": replace(GQA, position="cope"),
    "contextual positions, one key head": replace(MHA, attention="mqa", position="cope"),
    "queries without a latent": replace(SMALL, q_lora_rank=None),
    "wide heads": replace(SMALL, qk_nope_head_dim=56, qk_rope_head_dim=8, v_head_dim=24),
    "values as wide as queries": replace(SMALL, v_head_dim=12),
    "no shared experts": replace(SMALL, n_shared_experts=0),
    "two shared experts, three chosen": replace(SMALL, n_shared_experts=2, num_experts_per_tok=3),
    "grouped routing": replace(SMALL, n_routed_experts=8, n_group=2),
    "weights not normalised": replace(SMALL, norm_topk_prob=False),
    "dynamic tanh": replace(SMALL, norm="dyt"),
    "softmax routing": replace(SMALL, scoring_func="softmax", topk_method="group_limited_greedy", n_group=2),
}


@pytest.fixture(autouse=True)
def one_size_of_padded_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each expert's rows come to the same number, whichever tokens it gets: bytes can be compared exactly. The model
    and the formula must still ask for the same step."""
    asked: dict[Any, set[tuple[float, bool]]] = {activations: set(), products: set()}
    for module, by_it in asked.items():
        monkeypatch.setattr(module, "row_step", lambda rows, bf16, by_it=by_it: by_it.add((rows, bf16)) or 64)
    yield
    assert asked[activations] >= asked[products]


def kept_bytes(
    model: ModelConfig, layer: int, bf16: bool, recompute: Any, seq: int = 32, counting: Counting = EVERY_TOKEN
) -> int:
    """Bytes of the distinct storages that one block's graph keeps, parameters and what layers share left out."""
    block, rows = Block(model, layer), 2
    block.recompute = recompute
    for parameter in block.parameters():
        if parameter.dim() > 1:  # norms as they start: routing would not be even where a bias makes tokens alike
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(rows, seq, model.hidden_size, requires_grad=True)
    tokens = torch.zeros(rows, seq, dtype=torch.long)
    rotation = rotary_table(model)[None, :seq]
    mask = visible_tokens(model, torch.zeros(rows, seq, dtype=torch.long), seq, x.device)
    assert mask is not None
    shared = {t.untyped_storage().data_ptr() for t in (*block.parameters(), rotation, mask, tokens)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in shared:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        block(x, rotation, mask, counting=counting, tokens=tokens)
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
@pytest.mark.parametrize("name", MODELS)
def test_a_block_with_a_value_embedding_keeps_what_the_formula_says(name: str, bf16: bool) -> None:
    model = replace(MODELS[name], value_embeddings=True)
    work = of(model, bf16)
    weights = cast_weights(work, layer_weights(model, 1))
    assert layer_bytes(work, kernels("cpu"), 1) + weights == kept_bytes(model, 1, bf16, "none")


@pytest.mark.parametrize("name", ["small", "grouped routing"])
def test_large_experts_pad_their_rows_in_fp32_too(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where oneDNN makes their products, whatever this machine's processor."""
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: True)
    least = SMALL.hidden_size * 2 * SMALL.moe_intermediate_size * 8  # a few rows: of such experts all are large
    monkeypatch.setattr(products, "LEAST", least)
    work = of(MODELS[name], False)
    for onednn_from in (least, None):
        predicted = layer_bytes(work, replace(kernels("cpu"), onednn_from=onednn_from), 1)
        assert (predicted == kept_bytes(MODELS[name], 1, False, "none")) is (onednn_from is not None)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["small", "grouped attention", "one key head", "sliding", "wide heads"])
@pytest.mark.parametrize("longest", [LONGEST, 32], ids=["short rows", "long rows"])
def test_attention_by_blocks_keeps_what_the_formula_says(
    monkeypatch: pytest.MonkeyPatch, name: str, bf16: bool, longest: int
) -> None:
    """Probabilities of each block in bf16 and of wide heads, as long as a row is not too long for them."""
    monkeypatch.setattr(blocked, "LONGEST", longest)
    model = replace(MODELS[name], max_position_embeddings=300)
    work = replace(of(model, bf16), seq_len=270)
    weights = cast_weights(work, layer_weights(model, 0))
    assert layer_bytes(work, replace(kernels("cpu"), blocked_attention=longest), 0) + weights == kept_bytes(
        model, 0, bf16, "none", seq=270
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_attention_keeps_what_the_formula_says(monkeypatch: pytest.MonkeyPatch, name: str, bf16: bool) -> None:
    """As on a GPU."""
    monkeypatch.setitem(OVERRIDES, ("attention", "cpu"), fused_attention.attention)
    model, on = MODELS[name], replace(kernels("cpu"), blocked_attention=0)
    work = of(model, bf16)
    weights = cast_weights(work, layer_weights(model, 0))
    assert layer_bytes(work, on, 0) + weights == kept_bytes(model, 0, bf16, "none")


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_selective_checkpointing_keeps_the_feed_forward_alone(bf16: bool) -> None:
    work = of(SMALL, bf16, activation_checkpointing="selective")
    weights = cast_weights(work, (w for w in layer_weights(SMALL, 1) if w.kind != "attention"))
    mask = 2 * 32 * 32  # kept by the checkpoint as its argument; layers share it, so `part_bytes` counts it
    kept = kept_bytes(SMALL, 1, bf16, "selective")
    assert kept in (predicted := layer_bytes(work, kernels("cpu"), 1) + weights, predicted + mask)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("topk", [8, 32], ids=["chosen", "all"])
def test_sparse_attention_keeps_the_gradients_of_its_indexer(topk: int, bf16: bool) -> None:
    model = replace(SMALL, attention="dsa", index_n_heads=3, index_head_dim=12, index_topk=topk)
    work = of(model, bf16)
    weights = cast_weights(work, layer_weights(model, 1))
    kept = kept_bytes(model, 1, bf16, "none", counting=Counting(losses=LayerLosses(1.0)))
    assert layer_bytes(work, kernels("cpu"), 1) + weights == kept


def test_checkpointing_keeps_less_and_less() -> None:
    sizes = [layer_bytes(of(SMALL, False, activation_checkpointing=c), kernels("cpu"), 1) for c in CHECKPOINTING]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 2 * 32 * SMALL.hidden_size * 4


def nodes(last: Any) -> set[Any]:
    """The graph that ends in a node."""
    found, waiting = {last}, [last]
    while waiting:
        new = {node for node, _ in waiting.pop().next_functions if node is not None} - found
        found |= new
        waiting += new
    return found


def last_part_bytes(bf16: bool, mtp_weight: float, model: ModelConfig = SMALL) -> int:
    """Like `kept_bytes`, for the whole model with its loss, which holds gradients where autograd does not see them."""
    part = build_part(model, range(model.num_hidden_layers), Mesh(MeshSizes())).train()
    parts = Parts([part], None)
    parts.autocast_dtype = torch.bfloat16 if bf16 else None
    tokens = torch.randint(0, model.vocab_size, (2, 32))
    batch = Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens))
    shared = {t.untyped_storage().data_ptr() for t in (*parts.parameters(), part.rotary, tokens)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in shared:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), layer_losses([part], 1.0):
        [loss] = parts(0, [], batch, CrossEntropy(mtp_weight))
    for node in nodes(loss.grad_fn):
        for tensor in getattr(node, "gradients", ()):
            kept[tensor.untyped_storage().data_ptr()] = tensor
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("mtp_weight", [0.0, 0.3])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_whole_model_with_its_loss_keeps_what_the_formula_says(bf16: bool, mtp_weight: float) -> None:
    work = replace(of(SMALL, bf16), trains_mtp=mtp_weight > 0)
    predicted = part_bytes(work, kernels("cpu"), work.parts[0]) + sum(kept_by_loss(work).values())
    # The last token of a row has no label two places on, which the formula leaves out of account.
    assert predicted == pytest.approx(last_part_bytes(bf16, mtp_weight), rel=2e-3)


CHANGES = [
    {"recursion_depth": 3}, {"norm": "dyt"}, {"aux_loss_alpha": 0.1}, {"residual_scales": True},
    {"value_embeddings": True},
]  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_passes_norms_and_balancing_losses_add_what_the_formula_says(bf16: bool, changes: dict[str, Any]) -> None:
    """To what the plain model keeps, the same loss at its end."""
    model = replace(SMALL, **changes)
    plain, work = (replace(of(each, bf16), trains_mtp=True) for each in (SMALL, model))
    more = part_bytes(work, kernels("cpu"), work.parts[0]) - part_bytes(plain, kernels("cpu"), plain.parts[0])
    measured = last_part_bytes(bf16, 0.3, model) - last_part_bytes(bf16, 0.3)
    per_row = 4 * 2 * 4 * SMALL.n_routed_experts if "aux_loss_alpha" in changes else 0  # shares of choices: left out
    assert more == measured - per_row


@pytest.mark.parametrize(("tokens", "experts"), [(64, 4), (512, 8), (500, 8), (1000, 4), (96, 2)])
def test_rows_with_padding_are_the_mean_over_even_choices(tokens: int, experts: int) -> None:
    chosen = torch.rand(400, tokens, experts).topk(2).indices
    counts = torch.stack([torch.bincount(draw.flatten(), minlength=experts) for draw in chosen])
    for step in (64, row_step(2 * tokens / experts, bf16=True)):
        padded = (counts + step - 1) // step * step
        assert expected_rows(tokens, 2, experts, step) == pytest.approx(padded.sum(1).double().mean().item(), rel=0.01)
    assert expected_rows(tokens, 2, experts, 1) == 2 * tokens

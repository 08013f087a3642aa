"""What a loss takes, by training stage, against the bytes that are live while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.build import build_part
from model.config import ModelConfig
from model.kernels.limits import BLOCK_ELEMENTS, CHUNK_BYTES
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.costs.head_loss import DISTRIBUTIONS, backward_bytes, forward_bytes, kept_bytes, loss_tokens
from ray_pipeline.costs.kernels import kernels
from ray_pipeline.costs.memory import rank_memory
from ray_pipeline.costs.workload import FP32, Workload
from ray_pipeline.data.rows.batch import Batch, Extras
from ray_pipeline.layout.layout import Layout
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.objectives.distillation import Distillation
from ray_pipeline.objectives.divergence import Divergence
from ray_pipeline.objectives.grpo import Grpo
from ray_pipeline.objectives.preference import Dpo
from tests.costs.live_bytes import LiveBytes, reachable_tensors

MODEL = ModelConfig(
    vocab_size=8192, hidden_size=192, intermediate_size=64, num_hidden_layers=1, first_k_dense_replace=1,
    num_nextn_predict_layers=0, max_position_embeddings=1024,
)  # fmt: skip
ROWS, SEQ = 2, 1024
STAGES = ("pretrain", "dpo", "grpo", "distillation")
PRECISIONS = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


def of(stage: str, bf16: bool, **changes: Any) -> Workload:
    model = replace(MODEL, **changes)
    ahead = model.num_nextn_predict_layers > 0
    return Workload(
        stage, model, Layout(), rows=ROWS, seq_len=SEQ, micro_batch=ROWS, steps=1, bf16=bf16, trains_mtp=ahead
    )


def measured(stage: str, bf16: bool) -> tuple[int, int, int]:
    """Bytes above those before: at the fullest moment of the forward, after it, and at the fullest of the backward."""
    part = build_part(MODEL, range(1), Mesh(MeshSizes())).train()
    hidden = torch.randn(ROWS, SEQ, MODEL.hidden_size, requires_grad=True)
    tokens = torch.randint(0, MODEL.vocab_size, (ROWS, SEQ))
    extras = Extras(
        advantages=torch.randn(ROWS, SEQ), old_logprobs=torch.randn(ROWS, SEQ),
        teacher_hidden=torch.randn(ROWS, SEQ, MODEL.hidden_size), ref_logprobs=torch.randn(ROWS, SEQ),
        pair=torch.arange(ROWS).float().unsqueeze(1).expand(ROWS, SEQ),
        chosen=(torch.arange(SEQ) < SEQ // 2).float().expand(ROWS, SEQ),
    )  # fmt: skip
    batch = Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), extras)
    teacher = build_part(MODEL, range(1), Mesh(MeshSizes())).lm_head.requires_grad_(False)
    objective: Any = {
        "pretrain": CrossEntropy(), "dpo": Dpo(),
        "distillation": Distillation(Divergence(0.5, 2.0), teacher_head=teacher),
        "grpo": Grpo(beta=0.0, clip_low=0.2, clip_high=0.2, temperature=1.0),
    }[stage]  # fmt: skip
    for tensor in (hidden, part.lm_head.weight):
        tensor.grad = torch.zeros_like(tensor)
    with LiveBytes(reachable_tensors()) as live:
        before = live.live
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = objective(part, hidden, None, batch)[0]
        forward, kept = live.peak - before, live.live - before
        live.peak = live.live
        loss.backward()
        return forward, kept, live.peak - before


@PRECISIONS
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_keeps_and_needs_what_the_formula_says(stage: str, bf16: bool) -> None:
    work, on = of(stage, bf16), kernels("cpu")
    forward, kept, backward = measured(stage, bf16)
    cast = 2 * MODEL.vocab_size * MODEL.hidden_size if bf16 and stage in ("dpo", "grpo") else 0  # `kept_casts`
    predicted = work.tokens_at_once * loss_tokens(work) + sum(kept_bytes(work).values()) + cast
    assert predicted == pytest.approx(kept, rel=0.02)
    states = work.tokens_at_once * FP32 * MODEL.hidden_size  # the hidden states themselves: here before
    assert predicted + sum(forward_bytes(work, on).values()) - states == pytest.approx(forward, rel=0.05)
    assert predicted + sum(backward_bytes(work, on).values()) == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("stage", ["pretrain", "distillation"])
def test_what_a_loss_keeps_does_not_grow_with_the_vocabulary_times_tokens(stage: str) -> None:
    """A head's gradient, however long the rows, and a chunk of logits or two, with distributions of some of them."""
    work = of(stage, False)
    longer = replace(work, seq_len=2 * SEQ)
    assert kept_bytes(longer) == kept_bytes(work) == {"gradients of the head": 4 * 8192 * MODEL.hidden_size}
    on = replace(kernels("cpu"), onednn_from=None)  # whose products are added up where they are made
    chunk, block = CHUNK_BYTES["cpu"], FP32 * BLOCK_ELEMENTS
    expected = {"pretrain": chunk + block, "distillation": 2 * chunk + (DISTRIBUTIONS - 1) * block}
    assert forward_bytes(longer, on)["chunk of logits"] == expected[stage]


def test_every_mtp_module_keeps_gradients_of_the_head_of_its_own() -> None:
    plain, ahead = of("pretrain", False), of("pretrain", False, num_nextn_predict_layers=2)
    assert kept_bytes(ahead)["gradients of the head"] == 3 * kept_bytes(plain)["gradients of the head"]


def test_a_loss_can_be_the_fullest_moment() -> None:
    wide = of("distillation", False, vocab_size=65536)
    memory = rank_memory(wide, 0, "cpu")
    assert memory.moment == "loss"
    block = FP32 * BLOCK_ELEMENTS
    assert memory.buffers["chunk of logits"] == 2 * FP32 * 256 * 65536 + (DISTRIBUTIONS - 1) * block

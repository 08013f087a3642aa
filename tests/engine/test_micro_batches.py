"""How many rows pass the model at a time: tokens are what counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
    n_routed_experts=4, num_nextn_predict_layers=0, max_position_embeddings=32,
)  # fmt: skip


def engine(row_length: int | None) -> Engine:
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=0)
    return Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=optimizer, micro_batch=2, row_length=row_length))


def batch(rows: int, seq_len: int) -> Batch:
    tokens = torch.randint(CONFIG.vocab_size, (rows, seq_len + 1), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:]))


@pytest.mark.parametrize(
    ("row_length", "seq_len", "sizes"),
    [(None, 8, [2, 2, 2, 1]), (32, 32, [2, 2, 2, 1]),
     (32, 16, [4, 3]), (32, 12, [4, 3]), (32, 8, [7]), (8, 32, [2, 2, 2, 1])],
)  # fmt: skip
def test_shorter_rows_pass_the_model_in_as_many_as_make_the_same_tokens(monkeypatch, row_length, seq_len, sizes):
    seen: list[int] = []
    embed = Transformer.embed

    def counted(self: Transformer, tokens: torch.Tensor, noise: torch.Tensor | None = None) -> Any:
        seen.append(len(tokens))
        return embed(self, tokens, noise)

    monkeypatch.setattr(Transformer, "embed", counted)
    engine(row_length).evaluate(batch(7, seq_len), CrossEntropy())
    assert seen == sizes


def test_a_step_does_not_depend_on_how_many_rows_pass_at_a_time():
    few, many = engine(None), engine(32)
    for _ in range(3):
        a, b = (e.train_step(batch(7, 8), CrossEntropy(), 1e-2) for e in (few, many))
        assert a.loss == pytest.approx(b.loss, rel=2e-6) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)

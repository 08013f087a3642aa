"""Every layout takes the same steps as one process."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.config import OptimizerConfig
from ray_pipeline.data.batch import IGNORE, Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.distributed import run_ranks

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=4, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, grad_clip=0.5)


def make_batch(step: int, rows: int = 8, seq_len: int = 16) -> Batch:
    """Random tokens in two documents a row, boundaries differing by row."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, CONFIG.vocab_size, (rows, seq_len), generator=generator)
    cut = torch.randint(1, seq_len, (rows, 1), generator=generator)
    doc_ids = (torch.arange(seq_len)[None] >= cut).long()
    labels = torch.cat([tokens[:, 1:], torch.full((rows, 1), IGNORE)], 1)
    labels[:, :-1][doc_ids[:, 1:] != doc_ids[:, :-1]] = IGNORE
    return Batch(tokens, labels, doc_ids)


def train(rank: int, pp: int, dp: int, zero_stage: int, micro_batch: int, steps: int = 4, precision: str = "fp32"):
    torch.set_num_threads(1)
    mesh = Mesh(MeshSizes(pp=pp, dp=dp))
    engine = Engine(
        CONFIG, mesh, optimizer=OPTIMIZER, zero_stage=zero_stage, micro_batch=micro_batch, precision=precision
    )
    objective = CrossEntropy(mtp_weight=0.3)
    stats = [engine.train_step(make_batch(step), objective, OPTIMIZER.lr) for step in range(steps)]
    return [s.loss for s in stats], [s.grad_norm for s in stats], engine.full_state()


@pytest.fixture(scope="module")
def reference():
    return train(0, 1, 1, 0, 8)


@pytest.mark.parametrize(
    ("pp", "dp", "zero_stage", "micro_batch"),
    [(3, 1, 0, 2), (3, 1, 1, 2), (1, 2, 0, 2), (1, 2, 1, 4), (2, 2, 1, 1)],
)
def test_layout_equals_one_process(reference, pp, dp, zero_stage, micro_batch):
    losses, norms, state = run_ranks(train, pp * dp, pp, dp, zero_stage, micro_batch)[0]
    torch.testing.assert_close(losses, reference[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(norms, reference[1], rtol=1e-4, atol=0)
    assert state.keys() == reference[2].keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, reference[2][name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_accumulation_1x8_equals_8x1(reference):
    losses, norms, _ = train(0, 1, 1, 0, 1)
    torch.testing.assert_close(losses, reference[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(norms, reference[1], rtol=1e-4, atol=0)


def test_bf16_follows_fp32_and_is_the_same_over_a_pipeline(reference):
    losses, _, _ = train(0, 1, 1, 0, 2, 4, "bf16")
    torch.testing.assert_close(losses, reference[0], rtol=2e-2, atol=0)
    piped, _, _ = run_ranks(train, 3, 3, 1, 0, 2, 4, "bf16")[0]
    torch.testing.assert_close(piped, losses, rtol=2e-3, atol=0)


def evaluate_in(rank: int, pp: int, dp: int) -> float:
    engine = Engine(CONFIG, Mesh(MeshSizes(pp=pp, dp=dp)), micro_batch=2)
    return engine.evaluate(make_batch(3), CrossEntropy(0.3)).loss


def test_evaluation_is_the_same_in_every_layout():
    alone = evaluate_in(0, 1, 1)
    for pp, dp in ((3, 1), (2, 2)):
        results = run_ranks(evaluate_in, pp * dp, pp, dp)
        assert len(set(results)) == 1
        torch.testing.assert_close(results[0], alone, rtol=2e-6, atol=0)


def test_rows_that_do_not_divide_over_replicas_are_refused():
    mesh = Mesh(MeshSizes())
    mesh._ranks["dp"] = [0, 1, 2]
    with pytest.raises(ValueError, match="8 rows cannot be split over dp=3"):
        Engine(CONFIG, mesh).my_rows(make_batch(0))


def test_a_batch_without_labels_is_refused():
    engine = Engine(CONFIG, Mesh(MeshSizes()), optimizer=OPTIMIZER)
    batch = make_batch(0)
    batch.labels.fill_(IGNORE)
    with pytest.raises(ValueError, match="without a single trained token"):
        engine.train_step(batch, CrossEntropy(), 1e-3)


def test_padding_rows_train_nothing():
    batch = make_batch(0)
    padded = batch.pad_rows(12)
    results = []
    for rows in (batch, padded):
        engine = Engine(CONFIG, Mesh(MeshSizes()), optimizer=OPTIMIZER)
        results.append(engine.train_step(rows, CrossEntropy(0.3), 1e-2))
    assert len(padded) == 12 and results[0].weight == results[1].weight
    torch.testing.assert_close(results[1].loss, results[0].loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(results[1].grad_norm, results[0].grad_norm, rtol=1e-5, atol=0)

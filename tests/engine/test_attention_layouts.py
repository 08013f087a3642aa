"""Every kind of attention takes the same steps over heads and positions cut among ranks as in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from tests.distributed import run_ranks
from tests.engine.test_parity import make_batch

TINY = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=8, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    head_dim=8, n_routed_experts=8, max_position_embeddings=64, initializer_range=0.1, sliding_window=4,
    global_stride=3, cope_positions=5,
)  # fmt: skip
GQA = replace(TINY, attention="gqa", num_key_value_heads=2)
KINDS = {
    "mha": replace(TINY, attention="mha"),
    "gqa": GQA,
    "mqa": replace(TINY, attention="mqa"),
    "sliding": replace(GQA, attention="sliding"),
    "mla, cope": replace(TINY, position="cope"),
    "gqa, cope": replace(GQA, position="cope", num_hidden_layers=4),
}
SGD = OptimizerConfig(name="sgd", lr=1.0, warmup_steps=0, grad_clip=0.5)  # Adam would hide a wrong gradient scale
STEPS = 3
LAYOUTS = [MeshSizes(sp=4), MeshSizes(sp=2, tp=2), MeshSizes(dp=2, tp=2), MeshSizes(pp=2, sp=2)]
CASES = [
    *((kind, sizes, {}) for kind in KINDS for sizes in LAYOUTS),
    # A table that belongs to no layer of its own, where weights are gathered or their gradients put off.
    ("gqa, cope", MeshSizes(dp=4), {"zero_stage": 3, "activation_checkpointing": "selective"}),
    ("mla, cope", MeshSizes(dp=2, sp=2), {"zero_stage": 2}),
    ("gqa, cope", MeshSizes(pp=2, tp=2), {"schedule": "zbv"}),
]

Outcome = tuple[list[float], list[float], dict[str, torch.Tensor]]


def train(config: ModelConfig, sizes: MeshSizes, **options) -> Outcome:
    torch.set_num_threads(1)
    engine = Engine(config, Mesh(sizes), EngineOptions(optimizer=SGD, micro_batch=2, **options))
    stats = [engine.train_step(make_batch(step, rows=4), CrossEntropy(0.3), SGD.lr) for step in range(STEPS)]
    return [s.loss for s in stats], [s.grad_norm for s in stats], engine.full_state()


def train_all(rank: int) -> list[Outcome] | None:
    outcomes = [train(KINDS[kind], sizes, **options) for kind, sizes, options in CASES]
    return outcomes if rank == 0 else None


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """All cases in the same four processes: starting them is what takes time."""
    return run_ranks(train_all, 4)[0]


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome]:
    return {kind: train(config, MeshSizes()) for kind, config in KINDS.items()}


def assert_equal(got: Outcome, want: Outcome) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=0)
    assert got[2].keys() == want[2].keys()
    for name, weight in got[2].items():
        torch.testing.assert_close(weight, want[2][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_a_layout_equals_one_process(outcomes, references, index):
    assert_equal(outcomes[index], references[CASES[index][0]])


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", ["sliding", "mla, cope", "gqa, cope"])
def test_recomputing_activations_changes_no_bit(references, kind, recompute):
    losses, _, weights = train(KINDS[kind], MeshSizes(), activation_checkpointing=recompute)
    assert losses == references[kind][0] and all(torch.equal(weights[n], w) for n, w in references[kind][2].items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "cope" in kind])
def test_the_table_of_positions_is_trained(references, kind):
    tables = [weight for name, weight in references[kind][2].items() if name.endswith("position_embedding")]
    assert len(tables) == KINDS[kind].num_hidden_layers + 1 and all(bool(table.any()) for table in tables)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_follows_fp32(references, kind):
    losses = train(KINDS[kind], MeshSizes(), precision="bf16")[0]
    torch.testing.assert_close(losses, references[kind][0], rtol=2e-2, atol=0)

"""Training in 8 bits: close to bf16, and the same in every layout."""

from __future__ import annotations

import pytest
import torch

from model.build import use_fp8
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, OPTIMIZER, SGD, STEPS, Case, Outcome, case, make_batch, train

SGD_RATE = 0.1


def steps_without_bf16(rank: int, found: Case) -> Outcome:
    """As `train`, but all that is not a product in 8 bits is in fp32: no other rounding tells layouts apart."""
    torch.set_num_threads(1)
    options = dict(found.options)
    engine = Engine(CONFIG, Mesh(found.sizes), EngineOptions(optimizer=SGD, micro_batch=found.micro_batch, **options))
    for part in engine.parts:
        use_fp8(part)
    stats = [engine.train_step(make_batch(step), CrossEntropy(0.3), SGD_RATE) for step in range(STEPS)]
    return Outcome([s.loss for s in stats], [s.grad_norm for s in stats], engine.full_state(), {})


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return steps_without_bf16(0, case())


def thirty_losses(precision: str) -> list[float]:
    """Of a model that learns the same four batches over and over."""
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER, precision=precision, micro_batch=4))
    return [engine.train_step(make_batch(step % 4), CrossEntropy(0.3), 3e-3).loss for step in range(30)]


def test_thirty_steps_stay_near_those_of_bf16():
    bf16, fp8 = thirty_losses("bf16"), thirty_losses("fp8")
    assert bf16 != fp8
    assert bf16[-1] < bf16[0] - 0.5
    # Measured: 3.2% at most, 1.7% at the end; bf16 is 0.5% from fp32.
    assert fp8 == pytest.approx(bf16, rel=0.05)


@pytest.mark.parametrize(
    "layout",
    [
        case(tp=2),
        case(sp=2),
        case(dp=2, ep=2),
        case(pp=2, schedule="zbv"),
    ],
    ids=str,
)
def test_layouts_take_the_same_steps(layout, alone):
    outcome = run_ranks(steps_without_bf16, 2, layout)[0]
    assert outcome.losses == pytest.approx(alone.losses, rel=1e-5)
    assert outcome.norms == pytest.approx(alone.norms, rel=1e-4)


def test_activation_checkpointing_changes_nothing():
    whole, again = train(case(precision="fp8")), train(case(precision="fp8", activation_checkpointing="full"))
    assert again.losses == whole.losses and again.norms == whole.norms
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in whole.weights.items())

"""A parameter that no gradient reached in a step keeps its value and moments, in every layout and ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from model.parallel.gather import all_ranks_gather
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.engine.row_noise import seed_rows
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.post_training import LoraConfig
from ray_pipeline.settings.schema import OptimizerConfig
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, OPTIMIZER, Case, case, make_batch

# The MTP module is trained in the middle alone.
WEIGHTS = (0.0, 0.3, 0.3, 0.0)
MUON = OptimizerConfig(name="muon", lr=1e-2, warmup_steps=0)
LORA = LoraConfig(r=2, target_modules=["o_proj", "eh_proj"])
SETTINGS = {"adamw": OPTIMIZER, "muon": MUON}
CASES = {
    2: [
        case(dp=2), case(sp=2), case(tp=2), case(dp=2, ep=2), case(pp=2, schedule="zbv"), case(dp=2, optimizer="muon"),
        case(dp=2, zero_stage=1), case(dp=2, zero_stage=2), case(dp=2, zero_stage=3), case(pp=2, zero_stage=2),
        case(dp=2, zero_stage=2, offload_optimizer=True), case(dp=2, zero_stage=3, offload_optimizer=True),
        case(dp=2, ep=2, zero_stage=1), case(dp=2, ep=2, zero_stage=3),
        case(dp=2, lora=LORA), case(dp=2, zero_stage=2, lora=LORA), case(dp=2, zero_stage=3, lora=LORA),
    ],
}  # fmt: skip


@dataclass
class Told:
    """`mtp` is state of the module's parameters before training and after each step, on the ranks that have it."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    mtp: list[dict[str, torch.Tensor]]


def mtp_state(engine: Engine) -> dict[str, torch.Tensor]:
    state = engine.state()
    return {key: tensor.clone() for key, tensor in state.items() if ".mtp." in key and "expert_fraction" not in key}


def train(chosen: Case) -> Told:
    torch.set_num_threads(1)
    settings = SETTINGS[chosen.optimizer]
    engine = Engine(
        CONFIG, Mesh(chosen.sizes), EngineOptions(optimizer=settings, micro_batch=2, **dict(chosen.options))
    )
    told = Told([], [], {}, [mtp_state(engine)])
    for step, weight in enumerate(WEIGHTS):
        batch = seed_rows(make_batch(step), 0, step)
        stats = engine.train_step(batch, CrossEntropy(weight), settings.lr)
        told.losses.append(stats.loss)
        told.norms.append(stats.grad_norm)
        told.mtp.append(mtp_state(engine))
    told.weights = engine.full_state()
    told.mtp = max(all_ranks_gather(engine.mesh, told.mtp), key=lambda found: len(found[0]))
    return told


def train_all(rank: int, cases: list[Case]) -> list[Told]:
    return [train(chosen) for chosen in cases]


def alone(chosen: Case) -> Case:
    return Case(MeshSizes(), tuple(o for o in chosen.options if o[0] == "lora"), chosen.optimizer)


@pytest.fixture(scope="module")
def references() -> dict[str, Told]:
    wanted = {str(alone(chosen)): alone(chosen) for cases in CASES.values() for chosen in cases}
    return {name: train(chosen) for name, chosen in wanted.items()}


@pytest.fixture(scope="module")
def outcomes() -> dict[int, list[Told]]:
    return {world: run_ranks(train_all, world, cases)[0] for world, cases in CASES.items()}


def assert_kept(told: Told) -> None:
    """Nothing of the module moves in steps that leave it out, and it moves in the others."""
    for step, weight in enumerate(WEIGHTS):
        before, after = told.mtp[step], told.mtp[step + 1]
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert bool(moved) == bool(weight), (step, moved)


@pytest.mark.parametrize("name", ["adamw", "muon", "lora"])
def test_one_process_leaves_what_no_gradient_reached_as_it_was(references, name):
    chosen = {"adamw": Case(), "muon": Case(optimizer="muon"), "lora": Case(options=(("lora", LORA),))}[name]
    told = references[str(chosen)]
    assert_kept(told)
    assert any(key.startswith("model.mtp") and float(tensor.norm()) > 0 for key, tensor in told.mtp[0].items())


@pytest.mark.parametrize(("world", "index"), [(w, i) for w, cases in CASES.items() for i in range(len(cases))],
                         ids=[str(c) for cases in CASES.values() for c in cases])  # fmt: skip
def test_every_layout_does_as_one_process(references, outcomes, world, index):
    chosen = CASES[world][index]
    got, want = outcomes[world][index], references[str(alone(chosen))]
    assert_kept(got)
    torch.testing.assert_close(got.losses, want.losses, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.norms, want.norms, rtol=1e-4, atol=0)
    for name, tensor in got.weights.items():
        difference = (tensor - want.weights[name]).norm() / want.weights[name].norm().clamp(min=1e-6)
        assert difference < 1e-4, f"{name}: {difference}"


def test_a_module_that_waited_goes_on_from_a_checkpoint_as_if_unbroken():
    """The count of steps, which corrects the averages, is the optimizer's and not the parameter's."""
    objectives = [CrossEntropy(weight) for weight in (0.0, 0.0, 0.3, 0.3)]
    whole = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER))
    for step in range(2):
        whole.train_step(make_batch(step), objectives[step], OPTIMIZER.lr)
    resumed = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER, seed=3))
    resumed.load_state({key: tensor.clone() for key, tensor in whole.state().items()})
    for step in range(2, 4):
        for engine in (whole, resumed):
            engine.train_step(make_batch(step), objectives[step], OPTIMIZER.lr)
    one, other = whole.full_state(), resumed.full_state()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_experts_without_a_token_in_a_step_have_a_gradient_of_zero_and_are_decayed():
    """They are a part of one stacked parameter, in one process and where a rank holds none but them."""
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER))
    router = next(iter(engine.routers.values()))
    with torch.no_grad():
        router.e_score_correction_bias[3] = -1e4
    name = "layers.1.mlp.experts.down_proj"
    before = engine.full_state()[name]
    engine.train_step(make_batch(0), CrossEntropy(0.3), 1e-2)
    torch.testing.assert_close(engine.full_state()[name][3], before[3] * (1 - 1e-2 * OPTIMIZER.weight_decay))

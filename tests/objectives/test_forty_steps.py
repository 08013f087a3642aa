"""Five packed rows on two ranks, forty steps of every objective: what fills up the sixth row never decides anything.

The experts' bias moves at every step, so a rank that counted its padding would soon route other tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import Batch, Extras
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.base import Objective
from ray_pipeline.objectives.distillation import Distillation
from ray_pipeline.objectives.divergence import Divergence
from ray_pipeline.objectives.grpo import Grpo
from ray_pipeline.objectives.preference import Dpo
from ray_pipeline.settings.schema import OptimizerConfig
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG
from tests.objectives import batches

MODEL = replace(
    CONFIG, num_hidden_layers=4, num_nextn_predict_layers=0, router_bias_update_rate=0.01, aux_loss_alpha=0.01
)
ADAMW = OptimizerConfig(lr=1e-3, warmup_steps=0, grad_clip=0.3, eps=1e-5)  # rounding grows with the rate
STEPS = 40
LAYOUTS = {"dp2": (MeshSizes(dp=2), {}), "pp2-dualpipev": (MeshSizes(pp=2), {"schedule": "dualpipev"})}


def dpo(step: int) -> tuple[Objective, Batch]:
    return Dpo(), batches.pairs(step, batches.PAIR_ROWS[:5])


def grpo(step: int) -> tuple[Objective, Batch]:
    batch = batches.rollouts(step, batches.ROWS[:5])
    batch.extras.advantages += 1.0  # around zero the loss would be a small difference of large sums, all rounding
    return Grpo(beta=0.1, clip_low=0.2, clip_high=0.2, temperature=0.9), batch


def distillation(step: int) -> tuple[Objective, Batch]:
    batch = batches.rollouts(step, batches.ROWS[:5])
    generator = torch.Generator().manual_seed(step)
    logprobs = (2 * torch.randn(*batch.labels.shape, CONFIG.vocab_size, generator=generator)).log_softmax(-1)
    listed = logprobs.topk(5)
    batch.extras = Extras(teacher_topk_ids=listed.indices, teacher_topk_logprobs=listed.values)
    return Distillation(Divergence(0.0)), batch


GIVEN = {"dpo": dpo, "grpo": grpo, "distillation": distillation}
QUICK = [("dpo", "dp2"), ("grpo", "dp2"), ("distillation", "dp2"), ("grpo", "pp2-dualpipev")]
MORE = [("dpo", "pp2-dualpipev"), ("distillation", "pp2-dualpipev")]


def train(name: str, sizes: MeshSizes, **options) -> dict:
    torch.set_num_threads(1)
    engine = Engine(MODEL, Mesh(sizes), EngineOptions(optimizer=ADAMW, micro_batch=2, **options))
    stats, loads = [], []
    for step in range(STEPS):
        objective, batch = GIVEN[name](step)
        stats.append(engine.train_step(engine.fitted(batch), objective, ADAMW.lr))
        loads.append({key: load.clone() for key, load in engine.expert_loads.items()})
    return {"losses": [s.loss for s in stats], "loads": loads, "weights": engine.full_state()}


def train_all(rank: int, cases: list[tuple[str, str]]) -> dict:
    return {(name, layout): train(name, LAYOUTS[layout][0], **LAYOUTS[layout][1]) for name, layout in cases}


@pytest.fixture(scope="module")
def outcomes() -> dict:
    return run_ranks(train_all, 2, QUICK)[0]


@pytest.fixture(scope="module")
def more_outcomes() -> dict:
    return run_ranks(train_all, 2, MORE)[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    return {name: train(name, MeshSizes()) for name in GIVEN}


def assert_equal(got: dict, want: dict) -> None:
    torch.testing.assert_close(got["losses"], want["losses"], rtol=2e-6, atol=0)
    for mine, loads in zip(got["loads"], want["loads"], strict=True):
        for key, load in mine.items():
            assert torch.equal(load, loads[key]), key
    for key, tensor in got["weights"].items():
        torch.testing.assert_close(tensor, want["weights"][key], rtol=0, atol=1e-5, msg=lambda m, n=key: f"{n} {m}")


@pytest.mark.parametrize("case", QUICK, ids="-".join)
def test_rows_that_do_not_divide_take_the_steps_of_one_process(outcomes, alone, case):
    assert_equal(outcomes[case], alone[case[0]])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids="-".join)
def test_more_cases_take_the_steps_of_one_process(more_outcomes, alone, case):
    assert_equal(more_outcomes[case], alone[case[0]])

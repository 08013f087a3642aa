"""Every objective takes the same step in every layout, and however its documents lie in rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch

from model.layers.vocab import Head
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import Batch, Extras
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.base import Objective
from ray_pipeline.objectives.distillation import Distillation
from ray_pipeline.objectives.divergence import Divergence
from ray_pipeline.objectives.grpo import Grpo
from ray_pipeline.objectives.preference import Dpo
from ray_pipeline.objectives.sampler_gap import Correction
from ray_pipeline.settings.schema import OptimizerConfig
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG
from tests.objectives import batches

SGD = OptimizerConfig(name="sgd", lr=1.0, warmup_steps=0, grad_clip=100.0)
CLIPPED: dict[str, Any] = {"beta": 0.1, "clip_low": 0.1, "clip_high": 0.2, "temperature": 0.9, "max_new_tokens": 12}
GRPO = {
    "grpo": Grpo(loss_type="grpo", **CLIPPED),
    "dr_grpo": Grpo(loss_type="dr_grpo", **CLIPPED),
    "dapo": Grpo(loss_type="dapo", **CLIPPED),
    "gspo": Grpo(loss_type="grpo", importance_sampling_level="sequence", **CLIPPED),
    "tokens corrected": Grpo(correction=Correction("token_mask", 0.85, 1.1), off_policy_threshold=0.01, **CLIPPED),
    "answers corrected": Grpo(
        loss_type="grpo", correction=Correction("sequence_mask", 0.7, 1.2), off_policy_threshold=0.01, **CLIPPED
    ),
}
DPO = {
    "sigmoid": Dpo(),
    "ipo": Dpo(loss_type="ipo"),
    "sigmoid_norm": Dpo(loss_type="sigmoid_norm"),
    "robust": Dpo(label_smoothing=0.1),
}
# Divergence, weight of hidden states, length of the teacher's lists.
DISTILLATION: dict[str, tuple[Divergence, float, int | None]] = {
    "forward_kl": (Divergence(0.0, 2.0), 0.0, None),
    "reverse_kl": (Divergence(1.0), 0.0, None),
    "jsd": (Divergence(0.3, 2.0), 0.0, None),
    "whole head": (Divergence(0.3), 0.0, None),  # the teacher's, where the student's may be cut
    "hidden": (Divergence(0.0), 0.5, None),
    "top-k": (Divergence(0.0), 0.0, 5),
    "jsd of top-k": (Divergence(0.5, 2.0), 0.0, 5),
}
OBJECTIVES = (*GRPO, *DPO, *DISTILLATION)
LAYOUTS = {
    2: [MeshSizes(pp=2), MeshSizes(dp=2), MeshSizes(tp=2), MeshSizes(sp=2), MeshSizes(dp=2, ep=2)],
    4: [MeshSizes(sp=2, tp=2), MeshSizes(pp=2, sp=2, ep=2), MeshSizes(dp=2, tp=2, ep=2)],
}
QUICK = ("dapo", "gspo", "answers corrected", "sigmoid", "ipo", "jsd", "whole head", "hidden", "jsd of top-k")


@dataclass
class Outcome:
    loss: float
    norm: float
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]


def given(name: str, mesh: Mesh) -> tuple[Objective, Batch]:
    """The objective and its batch; a teacher is spread over the ranks as the student is."""
    if name in GRPO:
        return GRPO[name], batches.rollouts()
    if name in DPO:
        return DPO[name], batches.pairs()
    divergence, hidden_weight, k = DISTILLATION[name]
    batch = batches.rollouts()
    if k is not None:
        generator = torch.Generator().manual_seed(9)
        logprobs = (2 * torch.randn(*batch.labels.shape, CONFIG.vocab_size, generator=generator)).log_softmax(-1)
        listed = logprobs.topk(k)
        batch.extras = Extras(teacher_topk_ids=listed.indices, teacher_topk_logprobs=listed.values)
        return Distillation(divergence), batch
    teacher = Engine(CONFIG, mesh, EngineOptions(seed=3, micro_batch=2))
    hidden = teacher.per_token(batch, lambda model, hidden, ahead, rows: hidden)
    batch.extras = Extras(teacher_hidden=hidden)
    head = None if teacher.last_part is None else teacher.last_part.lm_head
    if name == "whole head":
        head = Head(CONFIG.hidden_size, CONFIG.vocab_size)
        head.weight.data = teacher.full_state()["lm_head.weight"]
    return Distillation(divergence, hidden_weight=hidden_weight, teacher_head=head), batch


def step(name: str, sizes: MeshSizes) -> Outcome:
    torch.set_num_threads(1)
    mesh = Mesh(sizes)
    objective, batch = given(name, mesh)
    engine = Engine(CONFIG, mesh, EngineOptions(optimizer=SGD, micro_batch=2))
    stats = engine.train_step(batch, objective, SGD.lr)
    return Outcome(stats.loss, stats.grad_norm, stats.metrics, engine.full_state())


def steps(rank: int, names: tuple[str, ...], layouts: list[MeshSizes]) -> dict[tuple[str, int], Outcome] | None:
    made = {(name, index): step(name, sizes) for index, sizes in enumerate(layouts) for name in names}
    return made if rank == 0 else None


def assert_equal(got: Outcome, want: Outcome) -> None:
    assert got.loss == pytest.approx(want.loss, rel=1e-5, abs=1e-6)
    assert got.norm == pytest.approx(want.norm, rel=1e-4) and want.norm > 1e-3
    assert got.metrics == pytest.approx(want.metrics, rel=1e-4, abs=1e-4)
    assert got.weights.keys() == want.weights.keys()
    for name, tensor in got.weights.items():
        torch.testing.assert_close(tensor, want.weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")


def title(sizes: MeshSizes) -> str:
    return "-".join(f"{axis}{size}" for axis, size in asdict(sizes).items() if size > 1)


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome]:
    return {name: step(name, MeshSizes()) for name in OBJECTIVES}


@pytest.fixture(scope="module")
def quick():
    return run_ranks(steps, 2, QUICK, LAYOUTS[2])[0]


@pytest.mark.parametrize("index", range(len(LAYOUTS[2])), ids=map(title, LAYOUTS[2]))
@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_take_the_step_of_one(references, quick, name, index):
    assert_equal(quick[name, index], references[name])


@pytest.fixture(scope="module")
def everything():
    return {world: run_ranks(steps, world, OBJECTIVES, layouts)[0] for world, layouts in LAYOUTS.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "index"), [(w, i) for w, some in LAYOUTS.items() for i in range(len(some))],
                         ids=[title(sizes) for some in LAYOUTS.values() for sizes in some])  # fmt: skip
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_the_step_of_one_rank(references, everything, name, world, index):
    assert_equal(everything[world][name, index], references[name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_documents_that_share_a_row_teach_what_they_teach_in_rows_of_their_own(name):
    mesh = Mesh(MeshSizes())
    objective, packed = given(name, mesh)
    alone = batches.at_the_start(batches.unpacked(packed, keep=2 if name in DPO else 1))
    assert len(alone) > len(packed)
    outcomes = []
    for batch in (packed, alone):
        engine = Engine(CONFIG, mesh, EngineOptions(optimizer=SGD, micro_batch=4))
        stats = engine.train_step(batch, objective, SGD.lr)
        trained = {key: value.detach().clone() for key, value in engine.named_parameters().items()}
        outcomes.append(Outcome(stats.loss, stats.grad_norm, stats.metrics, trained))
    assert_equal(outcomes[1], outcomes[0])

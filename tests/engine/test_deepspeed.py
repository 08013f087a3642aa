"""DeepSpeed's defects: each layout is wrong, or does not finish, without our workaround. A fix upstream shows here.

With the workarounds in place the same layouts are held against one process in test_parity.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine import zero
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, OPTIMIZER, Case, Outcome, assert_equal, case, make_batch, train

PATIENCE = timedelta(seconds=20)


def nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of a workaround."""


def without_tensor_rank() -> None:
    """The mpu tells the rank within the pipeline too, as its name would suggest."""
    Mesh.get_model_parallel_rank = lambda self: self.axis("model").index  # type: ignore[method-assign]


def without_contiguous_gradients() -> None:
    settings = zero._settings
    contiguous = {"contiguous_gradients": False}

    def changed(*args: Any) -> dict[str, Any]:
        given = settings(*args)
        return given | {"zero_optimization": given["zero_optimization"] | contiguous}

    zero._settings = changed


def without(name: str) -> Callable[[], None]:
    return lambda: setattr(zero, name, nothing)


def without_flag_reset() -> None:
    zero.ZeroUpdater.before_backward = nothing  # type: ignore[method-assign]


UNDO: dict[str, tuple[Callable[[], None], Case]] = {
    "unequal stages hang in ZeRO 3": (
        without("_skip_world_wide_checks"), case(pp=2, zero_stage=3, pp_layout="3|1", optimizer="sgd")),
    "ZeRO 3 forgets the experts' norm of other stages": (
        without("_sum_expert_norms"), case(pp=2, dp=2, ep=2, zero_stage=3, optimizer="sgd")),
    "a stage without experts leaves the others waiting for its part of the norm": (
        without("_count_experts_of_other_stages"),
        case(pp=2, dp=2, ep=2, zero_stage=1, pp_layout="E+1|3+H", optimizer="sgd")),
    "parameters that tensor ranks share count on one of them": (
        without_tensor_rank, case(pp=2, tp=2, zero_stage=3, optimizer="sgd")),
    "ZeRO 1 with experts needs contiguous gradients": (
        without_contiguous_gradients, case(dp=2, ep=2, zero_stage=1, optimizer="sgd")),
    "hooks stay shut in a second backward": (without_flag_reset, case(pp=2, zero_stage=2, optimizer="sgd")),
}  # fmt: skip


def train_without(rank: int, name: str) -> Outcome | str:
    undo, wanted = UNDO[name]
    undo()
    try:
        return train(wanted, timeout=PATIENCE)
    except Exception as error:  # noqa: BLE001  whatever the defect ends in
        return repr(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNDO)
def test_defect_is_still_there(name):
    wanted = UNDO[name][1]
    reference = train(Case(optimizer=wanted.optimizer))
    try:
        got = run_ranks(train_without, wanted.sizes.world, name, timeout=PATIENCE)[0]
    except (mp.ProcessRaisedException, mp.ProcessExitedException):  # a rank ended the world
        return
    if isinstance(got, str):
        return
    with pytest.raises(AssertionError):
        assert_equal(got, reference, wanted)


def moments_in(rank: int, stage: int, relink: bool) -> dict[str, torch.Tensor]:
    """State after two steps, and whether every parameter's moments are those of ZeRO 0."""
    torch.set_num_threads(1)
    if not relink:
        zero.ZeroUpdater._relink = nothing  # type: ignore[method-assign]
    engine = Engine(CONFIG, Mesh(MeshSizes(dp=2)), EngineOptions(optimizer=OPTIMIZER, zero_stage=stage, micro_batch=2))
    for step in range(2):
        engine.train_step(make_batch(step), CrossEntropy(0.3), OPTIMIZER.lr)
    return {name: tensor.clone() for name, tensor in engine.state().items()}


def test_the_moments_of_every_parameter_group_are_read():
    alone = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER, micro_batch=2))
    for step in range(2):
        alone.train_step(make_batch(step), CrossEntropy(0.3), OPTIMIZER.lr)
    want = alone.state()
    got = run_ranks(moments_in, 2, 1, True)[0]
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_defect_only_the_first_parameter_group_is_linked():
    with pytest.raises(Exception, match="process|Error"):
        run_ranks(moments_in, 2, 1, False)


def build_without_a_compiler(rank: int) -> bool:
    import os

    os.environ["PATH"] = ""
    engine = Engine(CONFIG, Mesh(MeshSizes(dp=2)), EngineOptions(optimizer=OPTIMIZER, zero_stage=1, micro_batch=2))
    return engine.train_step(make_batch(0), CrossEntropy(0.3), OPTIMIZER.lr).loss > 0


def test_zero_starts_on_a_cpu_without_a_compiler():
    assert run_ranks(build_without_a_compiler, 2) == [True, True]

"""Expected times where they can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.costs.hardware_table import find_hardware
from ray_pipeline.costs.timing import _play, flops_per_token, part_flops, part_launches, step_timing
from ray_pipeline.costs.workload import Workload, workload
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.engine.pipeline.schedule import build_schedule
from ray_pipeline.engine.pipeline.schedule_simulation import Costs, simulate
from ray_pipeline.layout.layout import Layout
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import OptimizerConfig
from tests.engine.test_parity import make_batch

H100 = replace(find_hardware("h100"), launch=0.0)
# A head that costs next to nothing, so that stages are alike.
EVEN = ModelConfig(
    vocab_size=8, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, first_k_dense_replace=99,
    num_nextn_predict_layers=0, num_attention_heads=8,
)  # fmt: skip


def work(model: ModelConfig = EVEN, rows: int = 32, seq_len: int = 512, **layout: Any) -> Workload:
    made = Layout(**layout)
    made = replace(made, gpus=made.pp * made.dp * made.tp * made.sp)
    trains_mtp = model.num_nextn_predict_layers > 0
    return Workload(
        "pretrain", model, made, rows=rows, seq_len=seq_len, micro_batch=1, steps=1, bf16=True, trains_mtp=trains_mtp
    )


def test_one_rank_computes_and_waits_for_nothing() -> None:
    timing = step_timing(work(), H100)
    forward, again = part_flops(work(), work().parts[0])
    assert (again, timing.bubble, timing.gradients) == (0, pytest.approx(0.0), 0.0)
    assert timing.seconds == pytest.approx(32 * 3 * forward / (989e12 * H100.achieved))
    assert timing.tokens_per_second == pytest.approx(32 * 512 / timing.seconds)
    assert 0.9 * H100.achieved < timing.mfu <= H100.achieved


@pytest.mark.parametrize(("pp", "rows"), [(2, 2), (4, 8), (8, 32)])
def test_1f1bs_bubble_is_pp_less_one_over_all_slots(pp: int, rows: int) -> None:
    """Megatron-LM (arXiv:2104.04473, §2.2.1), where messages cost nothing."""
    free = replace(H100, intra=1e30, inter=1e30)
    assert step_timing(work(rows=rows, pp=pp), free).bubble == pytest.approx((pp - 1) / (rows + pp - 1), rel=0.01)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv", "dualpipev"])
@pytest.mark.parametrize("micro_batches", [33, 61, 100])
def test_many_micro_batches_are_as_if_all_were_played(schedule: str, micro_batches: int) -> None:
    model = replace(EVEN, num_hidden_layers=9)  # stages differ
    uneven = work(model, rows=micro_batches, pp=4, schedule=schedule)
    costs = Costs(1, 2, 1, 1, 1e-3, tuple(1.0 + 0.1 * part.stage for part in uneven.parts))
    finish, busy = _play(uneven, costs)
    whole = simulate(build_schedule(schedule, 4, micro_batches), costs)
    assert finish == pytest.approx(whole.finish, rel=0.02)
    assert busy == pytest.approx(whole.busy)


def test_zero_bubble_schedules_have_a_smaller_one() -> None:
    free = replace(H100, intra=1e30, inter=1e30)
    names = ("1f1b", "interleaved_1f1b", "zbv")
    bubbles = {name: step_timing(work(pp=4, schedule=name), free).bubble for name in names}
    assert bubbles["zbv"] < bubbles["interleaved_1f1b"] < bubbles["1f1b"]


def test_full_checkpointing_computes_a_third_more() -> None:
    forward, again = part_flops(work(activation_checkpointing="full"), work().parts[0])
    assert again == pytest.approx(forward, rel=0.001)
    selective = part_flops(work(activation_checkpointing="selective"), work().parts[0])[1]
    assert 0 < selective < again / 2


def test_a_matrix_product_on_more_ranks_takes_less_time_each() -> None:
    alone, cut = (part_flops(work(tp=tp), work(tp=tp).parts[0])[0] for tp in (1, 4))
    assert 0.25 < cut / alone < 0.3  # what every rank computes whole: latents


def test_flops_per_token_leave_out_mtp_modules_that_do_not_train() -> None:
    with_mtp = replace(EVEN, num_nextn_predict_layers=1)
    assert flops_per_token(work(with_mtp)) > flops_per_token(replace(work(with_mtp), trains_mtp=False))
    assert flops_per_token(replace(work(with_mtp), trains_mtp=False)) == flops_per_token(work(EVEN))


def test_gradients_travel_beside_backward_but_for_zero_1() -> None:
    exposed = [step_timing(work(rows=4, dp=4, zero_stage=stage), H100).gradients for stage in (0, 1, 2)]
    assert exposed[0] < exposed[1]
    assert exposed[2] < exposed[1]


def test_every_pass_through_the_stack_computes_it_anew() -> None:
    once, thrice = (work(replace(EVEN, recursion_depth=depth)) for depth in (1, 3))
    (first, _), (all_of_them, _) = (part_flops(each, each.parts[0]) for each in (once, thrice))
    head = once.tokens_at_once * 2 * EVEN.vocab_size * EVEN.hidden_size
    assert all_of_them - head == 3 * (first - head)


def test_grpo_computes_its_logits_twice() -> None:
    plain, grpo = work(), replace(work(), stage="grpo")
    head = plain.tokens_at_once * 2 * EVEN.vocab_size * EVEN.hidden_size
    assert part_flops(grpo, grpo.parts[0]) == (part_flops(plain, plain.parts[0])[0], head)


class Operations(TorchDispatchMode):
    """Counts what PyTorch starts; views and empty memory are nothing that a device does."""

    VIEWS = ("view", "reshape", "transpose", "permute", "squeeze", "expand", "slice", "select", "split", "unbind")
    NOTHING = ("detach", "alias", "as_strided", "t", "unflatten", "empty", "lift_fresh", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.count += not (name in self.NOTHING or any(view in name for view in self.VIEWS) or "empty" in name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"first_k_dense_replace": 4}, {"num_nextn_predict_layers": 0}])
def test_launches_are_about_those_of_a_real_step(changes: dict[str, int]) -> None:
    small = replace(load_config(None, {}).model, num_hidden_layers=4, n_routed_experts=4, **changes)
    engine = Engine(small, Mesh(MeshSizes()), EngineOptions(optimizer=OptimizerConfig(), micro_batch=4))
    batch, objective = make_batch(0, seq_len=32), CrossEntropy(0.3)
    engine.train_step(batch, objective, 1e-3)
    with Operations() as operations:
        engine.train_step(batch, objective, 1e-3)
    plan = replace(work(small, rows=8), micro_batch=4)
    assert 2 * part_launches(plan, plan.parts[0]) == pytest.approx(operations.count, rel=0.25)


def test_a_tiny_models_step_takes_as_long_as_its_launches() -> None:
    config = load_config(None, {})
    hardware = find_hardware("h100")
    plan = workload(config, Layout(device="cuda"), "pretrain")
    launches = plan.micro_batches * part_launches(plan, plan.parts[0])
    assert step_timing(plan, hardware).seconds == pytest.approx(launches * hardware.launch, rel=0.01)
    assert 0.01 < step_timing(plan, hardware).seconds < 0.1, "tens of milliseconds"

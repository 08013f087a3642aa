"""Predicted memory against the bytes of real training steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.costs.memory import rank_memory, stage_memory
from ray_pipeline.costs.workload import Workload
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.layout.layout import Layout
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.lora_targets import adapter_params
from ray_pipeline.settings.post_training import LoraConfig
from ray_pipeline.settings.schema import OptimizerConfig
from tests.costs.live_bytes import LiveBytes, peak_bytes
from tests.distributed import run_ranks

MODEL = ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=384, moe_intermediate_size=96, num_hidden_layers=6,
    max_position_embeddings=256,
)  # fmt: skip
ROWS, SEQ, MICRO_BATCH = 8, 128, 2


def make_batch(rows: int) -> Batch:
    """Every token is trained on."""
    tokens = torch.randint(0, MODEL.vocab_size, (rows, SEQ), generator=torch.Generator().manual_seed(rows))
    return Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens))


def measure(rank: int, sizes: dict[str, int], options: dict[str, Any], rows: int) -> int:
    """Peak bytes of a rank's second step; the first one makes the optimizer's state."""
    torch.set_num_threads(1)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=0)
    engine = Engine(
        MODEL, Mesh(MeshSizes(**sizes)), EngineOptions(optimizer=optimizer, micro_batch=MICRO_BATCH, **options)
    )
    batch, objective = make_batch(rows), CrossEntropy(mtp_weight=0.3)
    engine.train_step(batch, objective, 1e-3)
    return peak_bytes(lambda: engine.train_step(batch, objective, 1e-3))


def check(sizes: dict[str, int], options: dict[str, Any], within: float) -> None:
    """Every rank's peak is as predicted."""
    mesh = MeshSizes(**sizes)
    rows = ROWS * mesh.pp
    peaks = run_ranks(measure, mesh.world, sizes, options, rows)  # one rank too: this process holds other tensors
    given = {key: value for key, value in options.items() if key != "precision"}
    bf16 = options.get("precision") == "bf16"
    layout = Layout(gpus=mesh.world, **sizes, **given)
    work = Workload("pretrain", MODEL, layout, rows=rows, seq_len=SEQ, micro_batch=MICRO_BATCH, steps=1, bf16=bf16)
    for rank, measured in enumerate(peaks):
        memory = rank_memory(work, mesh.coordinate(rank)["pp"], "cpu")
        predicted = memory.total + sum(memory.host.values())
        assert predicted == pytest.approx(measured, rel=within), f"rank {rank}: {memory}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_needs_what_is_predicted(precision: str) -> None:
    check({}, {"precision": precision}, within=0.01)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"dp": 2}, {}),
        ({"pp": 2, "dp": 2}, {"zero_stage": 1}),
        ({"tp": 2, "sp": 2}, {"zero_stage": 2}),
        ({"dp": 2, "ep": 2}, {"zero_stage": 3}),
    ],
)
def test_ranks_need_what_is_predicted(sizes: dict[str, int], options: dict[str, Any]) -> None:
    check(sizes, options, within=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"dp": 2}, {"zero_stage": 1}),
        ({"dp": 2}, {"zero_stage": 2}),
        ({"dp": 2}, {"zero_stage": 3}),
        ({"dp": 2}, {"zero_stage": 2, "offload_optimizer": True}),
        ({"dp": 2, "ep": 2}, {"zero_stage": 2, "precision": "bf16"}),
        ({"pp": 2}, {"schedule": "zbv"}),
        ({"pp": 2}, {"schedule": "interleaved_1f1b"}),
        ({"pp": 2}, {"schedule": "dualpipev"}),
        ({"pp": 2, "tp": 2}, {"precision": "bf16", "activation_checkpointing": "full"}),
        ({"dp": 2}, {"activation_checkpointing": "selective"}),
        ({"pp": 3}, {}),
    ],
)
def test_more_layouts_need_what_is_predicted(sizes: dict[str, int], options: dict[str, Any]) -> None:
    check(sizes, options, within=0.1)


def work(**layout: Any) -> Workload:
    made = Layout(**layout)
    made = replace(made, gpus=made.pp * made.dp * made.tp * made.sp)
    return Workload("pretrain", MODEL, made, rows=32, seq_len=SEQ, micro_batch=MICRO_BATCH, steps=1)


def test_sixteen_bytes_a_weight_before_zero() -> None:
    memory = rank_memory(work(), 0, "cpu")
    numbers = MODEL.num_params()
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * numbers, 4 * numbers, 8 * numbers)


def test_each_zero_stage_shares_more() -> None:
    kept = [rank_memory(work(dp=4, zero_stage=stage), 0, "cpu").kinds() for stage in range(4)]
    numbers = 4 * MODEL.num_params()
    assert [kind["optimizer"] for kind in kept] == [2 * numbers, *[3 * (numbers // 4)] * 3]
    assert [kind["gradients"] for kind in kept] == [numbers, numbers, numbers // 4, numbers // 4]
    assert kept[3]["weights"] < kept[2]["weights"] == numbers


def test_parts_of_all_pipeline_ranks_are_the_model() -> None:
    for schedule in ("1f1b", "zbv"):
        memory = stage_memory(work(pp=3, schedule=schedule), "cpu")
        assert sum(rank.weights for rank in memory) == 4 * MODEL.num_params()


def test_1f1b_holds_pp_micro_batches_on_the_first_rank_and_one_on_the_last() -> None:
    model = replace(MODEL, first_k_dense_replace=99, num_nextn_predict_layers=0)
    alike = replace(work(pp=3, pp_layout="E+2|2|2+H"), model=model, trains_mtp=False)
    first, second, last = (rank.activations for rank in stage_memory(alike, "cpu"))
    assert first == 3 * second // 2
    assert second // 2 < last < second  # the head's input comes with the last


LORA = LoraConfig(r=4)


def test_gradients_and_optimizer_are_those_of_adapters_alone() -> None:
    adapters = adapter_params(MODEL, range(MODEL.num_hidden_layers), LORA.r, [])
    memory = rank_memory(replace(work(), lora=LORA), 0, "cpu")
    assert (memory.gradients, memory.optimizer) == (4 * adapters, 8 * adapters)
    assert memory.weights == 4 * (MODEL.num_params() + adapters)
    sharded = rank_memory(replace(work(dp=4, zero_stage=3), lora=LORA), 0, "cpu")
    assert sharded.optimizer < memory.optimizer and sharded.weights < memory.weights
    parts = stage_memory(replace(work(pp=3), lora=LORA), "cpu")
    assert sum(part.weights for part in parts) == memory.weights


def test_training_adapters_needs_no_more_than_is_predicted() -> None:
    """Activations are counted as if every weight were trained; what frozen ones alone would need is not kept."""
    [measured] = run_ranks(measure, 1, {}, {"lora": LORA}, ROWS)
    whole = Workload("sft", MODEL, Layout(), rows=ROWS, seq_len=SEQ, micro_batch=MICRO_BATCH, steps=1)
    predicted = rank_memory(replace(whole, lora=LORA), 0, "cpu").total
    assert measured <= predicted < rank_memory(whole, 0, "cpu").total
    assert measured > predicted / 2


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    on_device, offloaded = (
        rank_memory(work(dp=2, zero_stage=2, offload_optimizer=flag), 0, "cuda") for flag in (False, True)
    )
    assert offloaded.optimizer == offloaded.gradients == 0
    assert offloaded.host["optimizer"] > on_device.optimizer
    assert offloaded.total < on_device.total


def test_live_bytes_count_storages_once_and_forget_freed_ones() -> None:
    weight = torch.zeros(100)
    with LiveBytes([weight]) as live:
        view = weight[10:]
        assert live.live == 400
        more = view + 1
        assert live.live == 400 + 360
        del more
        assert (live.live, live.peak) == (400, 760)
        assert torch.empty(10**9, device="meta").numel() == 10**9
    assert live.peak == 760


def test_muon_keeps_one_number_of_a_matrix_and_two_of_everything_else() -> None:
    engine = Engine(MODEL, Mesh(MeshSizes()), EngineOptions(optimizer=OptimizerConfig(name="muon", warmup_steps=0)))
    engine.train_step(make_batch(2), CrossEntropy(mtp_weight=0.3), 1e-3)
    state = engine.state()
    kept = sum(4 * tensor.numel() for name, tensor in state.items() if not name.startswith(("model.", "step")))
    assert rank_memory(replace(work(), muon=True), 0, "cpu").optimizer == kept

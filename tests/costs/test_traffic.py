"""Bytes on the wire, worked out by hand and seen on gloo, and how long they take."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.costs.hardware_table import find_hardware
from ray_pipeline.costs.traffic import Group, groups, rank_traffic
from ray_pipeline.costs.workload import Workload
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.layout.layout import Layout
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from tests.costs.test_memory import MODEL, SEQ, make_batch
from tests.distributed import run_ranks

NUMBERS = MODEL.num_params()
EXPERTS = 8 * 3 * MODEL.hidden_size * MODEL.moe_intermediate_size * 6  # in five layers and the MTP module


def work(model: ModelConfig = MODEL, rows: int = 8, **layout: Any) -> Workload:
    made = Layout(**layout)
    made = replace(made, gpus=made.pp * made.dp * made.tp * made.sp)
    return Workload("pretrain", model, made, rows=rows, seq_len=SEQ, micro_batch=2, steps=1)


def sent(workload: Workload, pp_rank: int = 0) -> dict[tuple[str, str], int]:
    return {(message.axis, message.operation): message.bytes for message in rank_traffic(workload, pp_rank)}


def test_one_rank_sends_nothing() -> None:
    assert rank_traffic(work(), 0) == []


def test_gradients_among_four_replicas_by_zero_stage() -> None:
    """A ring passes three quarters of its tensor on, an all-reduce does it twice; one micro-batch a step."""
    ring = 3 * 4 * NUMBERS // 4
    assert sent(work(dp=4)) == {("dp", "all-reduce"): 2 * ring}
    assert sent(work(dp=4, zero_stage=1)) == {("dp", "all-reduce"): 2 * ring, ("dp", "all-gather"): ring}
    assert sent(work(dp=4, zero_stage=3)) == {("dp", "reduce-scatter"): ring, ("dp", "all-gather"): ring}


def test_zero_2_and_3_send_gradients_after_every_micro_batch() -> None:
    once, thrice = (sent(work(rows=rows, dp=4, zero_stage=2)) for rows in (8, 24))
    assert thrice[("dp", "all-reduce")] == 3 * once[("dp", "all-reduce")]
    assert thrice[("dp", "all-gather")] == once[("dp", "all-gather")]


def test_spread_experts_are_reduced_among_those_who_hold_them() -> None:
    found = sent(work(dp=4, ep=2))
    assert found[("dp", "all-reduce")] == 2 * (3 * 4 * (NUMBERS - EXPERTS) // 4)
    assert found[("dp, experts", "all-reduce")] == 2 * (4 * EXPERTS // 2 // 2)
    assert ("dp, experts", "all-reduce") not in sent(work(dp=4, ep=4))


def test_a_rank_in_the_middle_of_the_pipeline_sends_both_ways() -> None:
    one = 2 * 2 * SEQ * MODEL.hidden_size * 4  # hidden states and embeddings of two rows
    found = [sent(work(pp=3), rank)[("pp", "send")] for rank in range(3)]
    assert found == [4 * one, 4 * 2 * one, 4 * one]


def test_the_tip_of_a_v_keeps_its_messages_to_itself() -> None:
    one = 2 * 2 * SEQ * MODEL.hidden_size * 4
    found = [sent(work(pp=2, schedule="zbv"), rank)[("pp", "send")] for rank in range(2)]
    assert found == [4 * 2 * one, 4 * 2 * one]


def test_checkpointing_repeats_the_messages_of_what_it_computes_again() -> None:
    kept, selective, full = (
        work(tp=2, dp=2, sp=1, ep=2, activation_checkpointing=name) for name in ("none", "selective", "full")
    )
    tp = [sent(each)[("tp", "all-reduce")] for each in (kept, selective, full)]
    ep = [sent(each)[("ep", "all-to-all")] for each in (kept, selective, full)]
    assert tp[0] < tp[1] < tp[2]
    assert ep[0] == ep[1] and 2 * ep[2] == 3 * ep[0]


def test_grpo_exchanges_the_normalisers_of_its_logits_in_backward_too() -> None:
    """Highest logit, sum and the label's own, of every token: an all-reduce among two sends each once, in fp32."""
    plain = replace(work(tp=2), trains_mtp=False)
    more = sent(replace(plain, stage="grpo"))["tp", "all-reduce"] - sent(plain)["tp", "all-reduce"]
    assert more == plain.micro_batches * 3 * 4 * plain.tokens_at_once


def test_rank_numbers_decide_which_groups_leave_a_node() -> None:
    h100 = find_hardware("h100")
    sizes = groups(work(pp=2, dp=4, sp=2, tp=2))
    assert (sizes["tp"], sizes["sp"], sizes["dp"]) == (Group(2, 1), Group(2, 2), Group(8, 2))
    near, far = (sizes[axis].seconds(1e9, h100, ring=True) for axis in ("tp", "dp"))
    assert (near, far) == (1e9 / (450e9 * 0.8), 1e9 / (50e9 * 0.8))


def test_an_all_to_all_over_two_nodes_sends_only_half_far() -> None:
    h100 = find_hardware("h100")
    assert Group(16, 1).seconds(1e9, h100, ring=False) == pytest.approx(8 / 15 * 1e9 / (50e9 * 0.8))


class _Counted(TorchDispatchMode):
    """Bytes given to each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in tree_iter(args[0]) if isinstance(t, torch.Tensor) and t.dtype == torch.float32]
            self.bytes[func.__name__.split(".")[0]] += sum(t.numel() * 4 for t in tensors)
        return func(*args, **(kwargs or {}))


def count(rank: int, sizes: dict[str, int], zero_stage: int, model: ModelConfig = MODEL) -> dict[str, int]:
    torch.set_num_threads(1)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=0)
    engine = Engine(
        model, Mesh(MeshSizes(**sizes)), EngineOptions(optimizer=optimizer, micro_batch=2, zero_stage=zero_stage)
    )
    engine.train_step(make_batch(8), CrossEntropy(0.3), 1e-3)
    with _Counted() as counted:
        engine.train_step(make_batch(8), CrossEntropy(0.3), 1e-3)
    dist.barrier()
    return dict(counted.bytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "zero_stage", "axis", "operation", "collective", "share"),
    [
        # share: what a rank of two sends of the bytes it gives to the collective
        ({"dp": 2}, 0, "dp", "all-reduce", "allreduce_", 1),
        ({"dp": 2}, 1, "dp", "all-gather", "_allgather_base_", 0.5),
        ({"dp": 2}, 2, "dp", "all-reduce", "allreduce_", 1),
        ({"dp": 2}, 3, "dp", "reduce-scatter", "_reduce_scatter_base_", 1),
        ({"tp": 2}, 0, "tp", "all-reduce", "allreduce_", 1),
        ({"sp": 2}, 0, "sp", "all-to-all", "alltoall_base_", 0.5),
        ({"dp": 2, "ep": 2}, 0, "ep", "all-to-all", "alltoall_base_", 0.5),
    ],
)
def test_collectives_carry_what_is_predicted(
    sizes: dict[str, int], zero_stage: int, axis: str, operation: str, collective: str, share: float
) -> None:
    counted = run_ranks(count, 2, sizes, zero_stage)
    mean = sum(rank[collective] for rank in counted) / 2  # routing sends one rank more rows than the other
    predicted = sent(work(zero_stage=zero_stage, **sizes))[(axis, operation)]
    assert share * mean == pytest.approx(predicted, rel=0.02)


GQA = replace(MODEL, attention="gqa", num_attention_heads=8, num_key_value_heads=2)
MQA = replace(MODEL, attention="mqa", num_attention_heads=8)


@pytest.mark.parametrize(
    ("model", "sp", "key_heads"),
    [(GQA, 2, 2), (GQA, 4, 4), (MQA, 4, 4)],
    ids=["a key head each", "a key head for two", "a key head for all"],
)
def test_sequence_parallelism_sends_every_rank_its_key_heads(model: ModelConfig, sp: int, key_heads: int) -> None:
    layers = model.num_hidden_layers + 1
    width = 2 * (8 + key_heads) * model.head_dim  # queries and output; keys and values
    there_and_back = 2 * 4 * width * (8 * SEQ // sp) * layers * (sp - 1) // sp
    assert sent(work(model, sp=sp))[("sp", "all-to-all")] == there_and_back


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sizes", "axis", "operation", "collective", "share"),
    [
        (GQA, {"tp": 2}, "tp", "all-reduce", "allreduce_", 1),
        (MQA, {"tp": 2}, "tp", "all-reduce", "allreduce_", 1),
        (GQA, {"sp": 2}, "sp", "all-to-all", "alltoall_base_", 0.5),
        (MQA, {"sp": 2}, "sp", "all-to-all", "alltoall_base_", 0.5),
    ],
)
def test_collectives_of_grouped_attention_carry_what_is_predicted(
    model: ModelConfig, sizes: dict[str, int], axis: str, operation: str, collective: str, share: float
) -> None:
    counted = run_ranks(count, 2, sizes, 0, model)
    mean = sum(rank[collective] for rank in counted) / 2
    assert share * mean == pytest.approx(sent(work(model, **sizes))[(axis, operation)], rel=0.02)

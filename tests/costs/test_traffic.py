"""Bytes on the wire, worked out by hand and seen on gloo, and how long they take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.moe.replay import columns
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.costs.hardware_table import find_hardware
from ray_pipeline.costs.traffic import Group, groups, rank_traffic
from ray_pipeline.costs.workload import Workload
from ray_pipeline.data.rows.batch import Batch, Extras
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.layout.layout import Layout
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from tests.costs.sent_bytes import Sent, SentBytes
from tests.costs.test_memory import MODEL, SEQ
from tests.distributed import run_ranks

NUMBERS = MODEL.num_params()
EXPERTS = 8 * 3 * MODEL.hidden_size * MODEL.moe_intermediate_size * 6  # in five layers and the MTP module


def work(model: ModelConfig = MODEL, rows: int = 8, **layout: Any) -> Workload:
    made = Layout(**layout)
    made = replace(made, gpus=made.pp * made.dp * made.tp * made.sp)
    ahead = model.num_nextn_predict_layers > 0
    return Workload("pretrain", model, made, rows=rows, seq_len=SEQ, micro_batch=2, steps=1, trains_mtp=ahead)


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
    assert tp[0] == tp[1] < tp[2]  # of attention alone nobody sums the output again
    assert ep[0] == ep[1] == ep[2]  # what came over the first hop is kept


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


PAIRS = list(combinations(range(MODEL.n_routed_experts), MODEL.num_experts_per_tok))
ROUTED = replace(MODEL, num_nextn_predict_layers=0)  # MTP modules choose by themselves
EVEN = 4 * len(PAIRS)  # tokens of a row: whatever share of them a rank sends, it has every pair of experts as often


def even_batch(model: ModelConfig) -> Batch:
    """Tokens whose experts are every pair in turn."""
    tokens = torch.randint(0, model.vocab_size, (8, EVEN), generator=torch.Generator().manual_seed(0))
    routing = torch.tensor(PAIRS * 4).repeat(8, 1, columns(model) // 2)
    return Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), extras=Extras(routing=routing))


@dataclass(frozen=True)
class Counted:
    """A layout whose bytes are counted, on nodes of `node` ranks.

    Attributes:
        only: one operation alone; else all. within: the plan's relative error; else none.
    """

    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    node: int | None = None
    model: ModelConfig = field(default_factory=lambda: ROUTED)
    only: str = ""
    within: float = 0.0

    def __str__(self) -> str:
        ahead = self.model.num_nextn_predict_layers or None
        parts = {**self.sizes, **self.options, "node": self.node, "mtp": ahead, self.model.attention: ""}
        return " ".join(f"{key}{value}" for key, value in parts.items() if value is not None)


def count(rank: int, cases: list[Counted]) -> list[tuple[Sent, Sent]]:
    """What a rank sends in a step in each layout, and what is planned."""
    torch.set_num_threads(1)
    return [_count(case) for case in cases]


def _count(case: Counted) -> tuple[Sent, Sent]:
    mesh = Mesh(MeshSizes(**case.sizes), node=case.node)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=0)
    engine = Engine(case.model, mesh, EngineOptions(optimizer=optimizer, micro_batch=2, **case.options))
    objective = CrossEntropy(0.3 * (case.model.num_nextn_predict_layers > 0))
    engine.train_step(even_batch(case.model), objective, 1e-3)
    with SentBytes() as counted:
        engine.train_step(even_batch(case.model), objective, 1e-3)
    layout = {key: value for key, value in case.options.items() if key != "fp8_dispatch"}
    given = replace(
        work(case.model, **case.sizes, **layout), seq_len=EVEN, node=case.node or mesh.world,
        fp8_dispatch=case.options.get("fp8_dispatch", False),
    )  # fmt: skip
    planned: Sent = Counter()
    for message in rank_traffic(given, mesh.pp_rank):
        planned[mesh.ranks(NAMES[message.axis]), message.operation] += message.bytes
    return counted.sent, planned


NAMES = {
    "tp": "tp", "sp": "sp", "ep": "ep_near", "ep, nodes": "ep_far", "dp": "replica", "dp, experts": "expert_replica",
    "pp": "pp",
}  # fmt: skip
FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
GQA = replace(ROUTED, attention="gqa", num_attention_heads=8, num_key_value_heads=2)
MQA = replace(ROUTED, attention="mqa", num_attention_heads=8)
COUNTED = {
    2: [
        Counted({"dp": 2}), Counted({"tp": 2}), Counted({"sp": 2}), Counted({"dp": 2, "ep": 2}),
        Counted({"sp": 2, "ep": 2}), Counted({"dp": 2}, {"zero_stage": 1}), Counted({"dp": 2}, {"zero_stage": 2}),
        Counted({"dp": 2, "ep": 2}, {"zero_stage": 1}), Counted({"tp": 2}, SELECTIVE), Counted({"tp": 2}, FULL),
        Counted({"sp": 2}, SELECTIVE), Counted({"dp": 2, "ep": 2}, FULL), Counted({"tp": 2}, model=GQA),
        Counted({"tp": 2}, model=MQA), Counted({"sp": 2}, model=GQA), Counted({"sp": 2}, model=MQA),
        Counted({"dp": 2}, model=MODEL), Counted({"sp": 2}, model=MODEL),
        # The head leaves out what has no token so far ahead.
        Counted({"tp": 2}, model=MODEL, within=1e-3),
        # Small weights are gathered less often than is planned.
        Counted({"dp": 2}, {"zero_stage": 3}, only="reduce-scatter"),
    ],
    4: [
        Counted({"dp": 4, "ep": 4}), Counted({"dp": 4, "ep": 4}, node=2), Counted({"dp": 4, "ep": 4}, FULL, node=2),
        Counted({"dp": 2, "tp": 2, "ep": 2}), Counted({"dp": 2, "tp": 2, "ep": 2}, node=2),
        Counted({"dp": 2, "tp": 2, "ep": 2}, FULL, node=2), Counted({"pp": 2, "dp": 2, "ep": 2}),
        Counted({"dp": 4, "ep": 2}), Counted({"sp": 2, "tp": 2, "ep": 2}),
        Counted({"dp": 4, "ep": 4}, {"fp8_dispatch": True}, node=2),
        Counted({"dp": 2, "tp": 2, "ep": 2}, {"fp8_dispatch": True, **FULL}, node=2),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def counted() -> dict[int, list[list[tuple[Sent, Sent]]]]:
    return {world: run_ranks(count, world, cases) for world, cases in COUNTED.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "index"),
    [(world, i) for world, cases in COUNTED.items() for i in range(len(cases))],
    ids=[str(case) for cases in COUNTED.values() for case in cases],
)
def test_every_rank_sends_what_is_planned_to_the_byte(counted: Any, world: int, index: int) -> None:
    case = COUNTED[world][index]
    for rank in counted[world]:
        sent, planned = ({key: n for key, n in of.items() if case.only in ("", key[1])} for of in rank[index])
        assert sent == pytest.approx(planned, rel=case.within, abs=0) and sum(sent.values()) > 0


@pytest.mark.parametrize(
    ("model", "sp", "key_heads"),
    [(GQA, 2, 2), (GQA, 4, 4), (MQA, 4, 4)],
    ids=["a key head each", "a key head for two", "a key head for all"],
)
def test_sequence_parallelism_sends_every_rank_its_key_heads(model: ModelConfig, sp: int, key_heads: int) -> None:
    layers = model.num_hidden_layers
    width = 2 * (8 + key_heads) * model.head_dim  # queries and output; keys and values
    there_and_back = 2 * 4 * width * (8 * SEQ // sp) * layers * (sp - 1) // sp
    assert sent(work(model, sp=sp))[("sp", "all-to-all")] == there_and_back

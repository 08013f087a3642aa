"""Steps with features, where they can be worked out another way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model.config import ModelConfig
from ray_pipeline.costs import featured_step
from ray_pipeline.costs.featured_step import FeaturedStep
from ray_pipeline.costs.features import ATTENTION, SPEEDS, Features
from ray_pipeline.costs.hardware_table import find_hardware
from ray_pipeline.costs.published_runs import LLAMA_70B, QWEN3_235B, V3
from ray_pipeline.costs.timing import flops_per_token
from ray_pipeline.costs.traffic import groups, layer_messages
from ray_pipeline.costs.workload import Workload
from ray_pipeline.engine.pipeline.schedule import build_schedule
from ray_pipeline.engine.pipeline.schedule_simulation import simulate
from ray_pipeline.errors import UserError
from ray_pipeline.layout.layout import Layout

H100 = find_hardware("h100")


def step(features: Features, model: ModelConfig = LLAMA_70B, rows: int = 16, **axes: Any) -> FeaturedStep:
    layout = Layout(device="cuda", **axes)
    layout = replace(layout, gpus=layout.pp * layout.dp * layout.tp)
    ahead = model.num_nextn_predict_layers > 0
    work = Workload("pretrain", model, layout, rows, 4096, micro_batch=1, steps=1, bf16=True, trains_mtp=ahead)
    return FeaturedStep(work, H100, features)


@pytest.mark.parametrize("model", [LLAMA_70B, QWEN3_235B, V3])
def test_one_rank_computes_the_models_flops(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(featured_step, "GROUPED", 1.0)  # experts' products as quick as the others
    one = step(Features(), model)
    shares = one.explain().shares
    products = shares["products"] * SPEEDS["h100"].sustained * SPEEDS["h100"].bf16
    attention = shares["attention"] * ATTENTION * H100.bf16
    attention *= 3 / 3.5  # scores that backward makes again are no model FLOPs
    assert products + attention == pytest.approx(flops_per_token(one.work) * one.work.tokens_per_step, rel=0.01)
    assert shares["dispatch"] == shares["messages of tp"] == shares["idle in the pipeline"] == 0


def test_a_row_for_every_node_takes_as_long_as_this_engines_exchange_between_nodes() -> None:
    """But for what goes with the row: experts and their weights."""
    plain = step(Features(), V3, rows=128, ep=64, dp=64)
    ours = replace(plain.work, node=H100.node)
    sent = layer_messages(ours, 10)["ep, nodes"][0]
    seconds = groups(ours)["ep, nodes"].seconds(sent, H100, ring=False)
    assert plain._messages(10)["dispatch"] == pytest.approx(seconds, rel=0.003)


def test_tensor_parallel_ranks_without_sequence_parallelism_send_each_token_as_often_as_there_are() -> None:
    shared, apart = (
        step(Features(sequence_parallel=shares), V3, rows=64, tp=2, ep=64, dp=64)._messages(10)["dispatch"]
        for shares in (True, False)
    )
    assert apart == 2 * shared


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved_1f1b", 2)])
def test_idle_time_is_that_of_the_schedule_when_played(schedule: str, chunks: int) -> None:
    explained = step(Features(chunks=chunks), rows=32, pp=4).explain()
    played = simulate(build_schedule(schedule, 4, 32))
    idle = explained.shares["idle in the pipeline"] / (explained.seconds - explained.shares["gradients and update"])
    assert idle == pytest.approx(float(played.bubble[0]), rel=0.05)


def test_what_goes_beside_computing_costs_less() -> None:
    axes = {"rows": 512, "tp": 2, "pp": 2, "ep": 16, "dp": 16}
    seen, hidden = (step(Features(overlaps_dispatch=hides), V3, **axes).explain() for hides in (False, True))
    assert 0.6 < hidden.shares["dispatch"] / seen.shares["dispatch"] < 0.7
    assert hidden.seconds < seen.seconds
    tp, pieces = (step(Features(overlaps_tp=hides), tp=4).explain().shares["messages of tp"] for hides in (False, True))
    assert pieces == pytest.approx(tp / 4)


def test_a_device_without_measured_speeds_is_refused_by_name() -> None:
    work = step(Features()).work
    with pytest.raises(UserError, match=r"b200: .* Use one of a100-80gb, h100, h800\."):
        FeaturedStep(work, find_hardware("b200"), Features())

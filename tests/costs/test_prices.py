"""What a run costs: list prices, one's own, what was spent, and what follows at shares of the budget."""

from __future__ import annotations

import time

import pytest

from ray_pipeline.costs.prices import MODAL_USD_PER_SECOND, price, spent, spent_text, usd
from ray_pipeline.settings.checks import problems
from ray_pipeline.settings.schema import CostConfig, LayoutConfig, ModalConfig, PipelineFields


def config(backend: str = "modal", gpu: str = "H100", **cost: float) -> PipelineFields:
    return PipelineFields(
        backend=backend, modal=ModalConfig(gpu_type=gpu), cost=CostConfig(**cost), layout=LayoutConfig(gpus=3)
    )


def stage(status: str = "done", **values: float) -> dict:
    return {"stage": "sft", "status": status, "ranks": 3, **values}


def test_modal_has_a_list_price_and_one_s_own_wins():
    found = price(config())
    assert found is not None and found.usd_per_hour == pytest.approx(MODAL_USD_PER_SECOND["h100"] * 3600)
    assert "modal.com/pricing" in found.source
    assert price(config(gpu="A100-80GB:8")) is not None and price(config(gpu="unheard-of")) is None
    assert price(config(usd_per_gpu_hour=1.5)).usd_per_hour == 1.5
    assert price(config("cpu")) is None


def test_what_was_spent_counts_every_attempt_and_the_one_that_runs():
    own = config("cuda", usd_per_gpu_hour=2.0)
    now = time.time()
    stages = [
        stage(seconds=3600.0),
        stage("running", seconds=0.0, started=now - 1800),
        stage("interrupted", seconds=0.0, started=now - 9000, progress={"time": now - 7200}),
        {"stage": "grpo", "status": "pending"},
    ]
    assert spent(own, stages) == pytest.approx((1 + 0.5 + 0.5) * 3 * 2.0, rel=1e-3)
    assert spent(config("cpu"), stages) is None and spent_text(config("cpu"), stages) is None


def test_gpus_are_paid_for_where_no_rank_trains_on_machines_rented_whole_alone():
    alone = [{"stage": "data_prep", "status": "done", "ranks": 1, "seconds": 3600.0}]
    assert spent(config(usd_per_gpu_hour=1.0), alone) == 0.0, "data is prepared in a container without GPUs"
    assert spent(config("cuda", usd_per_gpu_hour=1.0), alone) == 0.0
    assert spent(config("cuda", usd_per_gpu_hour=1.0, whole_run=True), alone) == pytest.approx(3.0)


def test_of_several_types_the_dearest_is_reckoned_with():
    assert price(config(gpu="L4, H100")).usd_per_hour == pytest.approx(MODAL_USD_PER_SECOND["h100"] * 3600)
    assert price(config(gpu="H100,unheard-of")) is None


def test_the_line_of_status():
    text = spent_text(config("cuda", usd_per_gpu_hour=2.0, budget_usd=20.0), [stage(seconds=3600.0)])
    assert text == "spent so far: $6.00 of $20.00, at $2.00 a GPU hour (cost.usd_per_gpu_hour)"
    assert usd(1234.5) == "$1,234"


def test_a_budget_without_a_price_is_refused():
    (text,) = [text for text in problems(config("cuda", budget_usd=5.0)) if text.startswith("cost.")]
    assert text.startswith("cost.budget_usd=5: what a GPU costs here is not known.")

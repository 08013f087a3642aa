"""What GPUs cost, and what a run has cost so far. The only place with prices; they change, so they carry their date.

Modal's prices per GPU and second, as several pages of mid-2026 quote modal.com/pricing and agree; look there before you
rely on them. None quotes B300, which so has no estimate, and takes no budget without `cost.usd_per_gpu_hour`. Choosing
a region multiplies them by 1.25 to 2.5, and CPU and memory beyond what comes with a GPU are billed as well; neither is
counted here. A price of one's own, for a cluster or for a contract, is `cost.usd_per_gpu_hour`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields

DATE, SOURCE = "2026-06", "modal.com/pricing"
MODAL_USD_PER_SECOND = {
    "b200": 0.001736,
    "h200": 0.001261,
    "h100": 0.001097,
    "rtx-pro-6000": 0.000842,
    "a100-80gb": 0.000694,
    "a100-40gb": 0.000583,
    "a100": 0.000583,
    "l40s": 0.000542,
    "a10": 0.000306,
    "a10g": 0.000306,
    "l4": 0.000222,
    "t4": 0.000164,
}


@dataclass(frozen=True)
class Price:
    """Of one GPU for an hour. whole_run: GPUs are paid for in every stage, not in those alone that train."""

    usd_per_hour: float
    source: str
    whole_run: bool


def price(config: PipelineFields) -> Price | None:
    """What a GPU of this run costs; None where that is not known, or it costs nothing."""
    modal = config.backend == "modal"
    if config.cost.usd_per_gpu_hour is not None:
        return Price(config.cost.usd_per_gpu_hour, "cost.usd_per_gpu_hour", config.cost.whole_run)
    if not modal:
        return None
    names = [name.strip().split(":")[0].rstrip("!+") for name in config.modal.gpu_type.lower().split(",")]
    found = [MODAL_USD_PER_SECOND[name] for name in names if name in MODAL_USD_PER_SECOND]
    if len(found) < len(names):
        return None
    # Whichever type is had, it is not more than this.
    return Price(max(found) * 3600, f"{SOURCE}, {DATE}", config.cost.whole_run)


def with_price(config: PipelineFields) -> PipelineFields:
    """The same settings with the price in them, for a machine that does not know where it is rented."""
    each = price(config)
    if each is None:
        return config
    known = config.cost.model_copy(update={"usd_per_gpu_hour": each.usd_per_hour, "whole_run": each.whole_run})
    return config.model_copy(update={"cost": known})


def spent(config: PipelineFields, stages: Sequence[Mapping[str, Any]]) -> float | None:
    """US dollars of all attempts so far, from `ledger.read_status`'s stages; None without a price."""
    each = price(config)
    if each is None:
        return None
    return sum(_gpu_hours(entry, config, each) for entry in stages) * each.usd_per_hour


def _gpu_hours(entry: Mapping[str, Any], config: PipelineFields, each: Price) -> float:
    seconds = float(entry.get("seconds") or 0.0)
    seen = (entry.get("progress") or {}).get("time") or entry.get("started") or 0.0
    if entry["status"] == "running":
        seconds += max(0.0, time.time() - float(entry["started"]))
    elif entry["status"] == "interrupted":  # it lived until its last sign of life
        seconds += max(0.0, float(seen) - float(entry["started"]))
    ranks = int(entry.get("ranks") or 0)
    trains = entry["stage"] in TRAINING_STAGES
    gpus = (config.layout.gpus or ranks) if each.whole_run else ranks if trains else 0
    return seconds / 3600 * gpus


def usd(amount: float) -> str:
    """`$0.42`, `$1,204`."""
    return f"${amount:,.0f}" if amount >= 1000 else f"${amount:,.2f}"


def spent_text(config: PipelineFields, stages: Sequence[Mapping[str, Any]]) -> str | None:
    """`spent so far: $3.20 of $20.00, at $3.95 a GPU hour (modal.com/pricing, 2026-06)`; None without a price."""
    each, amount = price(config), spent(config, stages)
    if each is None or amount is None:
        return None
    budget = config.cost.budget_usd
    of = "" if budget is None else f" of {usd(budget)}"
    return f"spent so far: {usd(amount)}{of}, at {usd(each.usd_per_hour)} a GPU hour ({each.source})"

"""What a run has cost, looked at while it runs: told at shares of the budget, and stopped before it is used up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ray_pipeline.costs.estimate import make_plan
from ray_pipeline.costs.hardware_table import Hardware, rented_hardware, running_hardware
from ray_pipeline.costs.prices import price, spent, usd
from ray_pipeline.dag.ledger import read_status
from ray_pipeline.dag.plan import PlannedStage
from ray_pipeline.errors import UserError
from ray_pipeline.launch.cluster import Cluster
from ray_pipeline.layout.layout import Layout
from ray_pipeline.records.progress import ask_to_stop
from ray_pipeline.records.units import seconds_text
from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields

WARN_AT = (0.5, 0.75, 0.9)
STOP_AT = 0.99
EVERY = 5.0  # seconds between looks


class Budget:
    """Of one run; `say` shows a line on the terminal."""

    def __init__(self, config: PipelineFields, run_dir: Path, say: Callable[[str], None]):
        self.config, self.run_dir, self.say = config, run_dir, say
        self._told, self._looked = 0.0, 0.0

    def look(self) -> None:
        """Call often; it looks every few seconds, and not at all without a budget."""
        budget = self.config.cost.budget_usd
        if budget is None or time.monotonic() - self._looked < EVERY:
            return
        self._looked = time.monotonic()
        amount = spent(self.config, read_status(self.run_dir)["stages"])
        if amount is None:
            return
        share = amount / budget
        reached = max((mark for mark in (*WARN_AT, STOP_AT) if share >= mark), default=0.0)
        if reached <= self._told:
            return
        self._told = reached
        self.say(f"Budget: {usd(amount)} of {usd(budget)} are spent ({share:.0%}).")
        if reached == STOP_AT:
            reason = f"{usd(amount)} of cost.budget_usd={budget:g} are spent"
            self.say("The run saves and stops.")
            ask_to_stop(self.run_dir, reason)


def estimate_lines(
    config: PipelineFields, layout: Layout, rows: list[PlannedStage], cluster: Cluster | None = None
) -> list[str]:
    """Hours and money of the training stages that will run; nothing without a price. Sampling and evaluations, whose
    length nobody knows before, are not in it."""
    each = price(config)
    if each is None:
        return []
    hardware: Hardware | None
    try:
        if config.backend == "modal":
            hardware = rented_hardware(config)
        else:
            hardware = running_hardware(config, layout.device, cluster)
    except UserError:
        hardware = None
    if hardware is None:
        return [f"{usd(each.usd_per_hour * layout.gpus)} an hour for {layout.gpus} GPUs ({each.source})."]
    lines, total = [], 0.0
    for row in rows:
        if row.stage in TRAINING_STAGES and row.action in ("run", "resume"):
            plan = make_plan(config, layout, row.stage, hardware)
            seconds = plan.timing.seconds * plan.work.steps
            total += (cost := seconds / 3600 * layout.gpus * each.usd_per_hour)
            lines.append(f"  {row.stage:<13}about {seconds_text(seconds)}, {usd(cost)}")
    if not lines:
        return []
    rate = f"{layout.gpus} GPUs at {usd(each.usd_per_hour)} an hour, {each.source}"
    return [f"Training will cost about {usd(total)} ({rate}); sampling and evaluations come on top:", *lines]

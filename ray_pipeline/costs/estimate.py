"""Everything that `plan` says about a layout, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ray_pipeline.costs.advice import advise
from ray_pipeline.costs.fit import Fit, judge, with_sampling
from ray_pipeline.costs.hardware_table import Hardware, for_ranks
from ray_pipeline.costs.picture import RankMap, placement, pp_layout_text, rank_map
from ray_pipeline.costs.row_reading import Reading, reading
from ray_pipeline.costs.timing import Timing, flops_per_token, message_seconds, step_timing
from ray_pipeline.costs.traffic import Traffic, groups, rank_traffic
from ray_pipeline.costs.weights import counts, main_model
from ray_pipeline.costs.workload import Workload, workload
from ray_pipeline.layout.layout import Layout
from ray_pipeline.settings.schema import PipelineFields


@dataclass(frozen=True)
class Plan(Fit):
    """One training stage in one layout on one kind of device.

    Attributes:
        hardware: what one rank has. parameters: "total" and "active" numbers by kind.
        traffic: of each pipeline rank. advice: flags that would make it fit, where it does not.
        reading: rows from disk; None where there are none.
    """

    work: Workload
    hardware: Hardware
    parameters: dict[str, dict[str, int]]
    traffic: list[list[Traffic]]
    timing: Timing
    ranks: RankMap
    advice: list[str]
    reading: Reading | None

    def messages(self) -> list[tuple[Traffic, float]]:
        """Per axis and operation what the rank that sends most of it sends, with the seconds it takes."""
        most: dict[tuple[str, str], Traffic] = {}
        for message in (message for rank in self.traffic for message in rank):
            key = (message.axis, message.operation)
            if key not in most or most[key].bytes < message.bytes:
                most[key] = message
        sizes = groups(self.work)
        return [(message, message_seconds(message, sizes, self.hardware)) for message in most.values()]

    def as_dict(self) -> dict[str, Any]:
        """The whole plan, as JSON takes it. Bytes, seconds and plain numbers."""
        work, timing = self.work, self.timing
        total, active = (main_model(self.parameters[kind]) for kind in ("total", "active"))
        return {
            "stage": work.stage,
            "layout": asdict(work.layout),
            "hardware": asdict(self.hardware) | {"usable_memory": self.usable},
            "parameters": self.parameters | {"total_without_mtp": total, "active_without_mtp": active},
            "step": {
                "rows": work.rows,
                "tokens": work.tokens_per_step,
                "micro_batches_per_rank": work.micro_batches,
                "flops_per_token": flops_per_token(work),
                "flops": flops_per_token(work) * work.tokens_per_step,
            },
            "placement": placement(work),
            "pp_layout": pp_layout_text(work),
            "memory": [
                {
                    "moment": m.moment,
                    "total": m.total,
                    **m.kinds(),
                    "buffers_by_name": m.buffers,
                    "host": m.host,
                    "needs": needed,
                }
                for m, needed in zip(self.memory, self.needs, strict=True)
            ],
            "host_memory_of_a_node": {"needs": self.host, "usable": self.host_usable},
            "fullest_pp_rank": self.fullest,
            "fits": self.fits,
            "advice": self.advice,
            "communication": [
                {"axis": message.axis, "operation": message.operation, "bytes": message.bytes, "seconds": seconds}
                for message, seconds in self.messages()
            ],
            "reading": None if self.reading is None else asdict(self.reading),
            "timing": asdict(timing) | {"stage_seconds": timing.seconds * work.steps, "steps": work.steps},
        }


def make_plan(
    config: PipelineFields, layout: Layout, stage: str, hardware: Hardware, *, judged: PipelineFields | None = None
) -> Plan:
    """What training stage `stage` costs in a layout that is known to be legal.

    Args:
        judged: the settings that advised layouts must be legal for; default: those of the whole run.
    """
    layout = replace(layout, device="cpu" if hardware.device == "cpu" else "cuda")
    config = with_sampling(config, layout, stage, hardware)
    work, each = workload(config, layout, stage, hardware.node), for_ranks(hardware, layout.gpus)
    fit = judge(work, each)
    return Plan(
        **vars(fit), work=work, hardware=each, parameters=counts(work.model),
        traffic=[rank_traffic(work, rank) for rank in range(layout.pp)],
        timing=step_timing(work, each),
        ranks=rank_map(work),
        advice=[] if fit.fits_device else advise(judged or config, work, fit.usable, each),
        reading=reading(work, hardware.node),
    )  # fmt: skip

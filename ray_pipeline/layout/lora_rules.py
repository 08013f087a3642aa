"""Rules of layouts that come with low-rank adapters, for the table in `layout_rules`."""

from __future__ import annotations

from collections.abc import Callable

from model.parallel.placement import num_stages, parts_of, stage_layers
from ray_pipeline.layout.layout import Layout, Refusal
from ray_pipeline.settings.chain import trained
from ray_pipeline.settings.lora_targets import adapter_params
from ray_pipeline.settings.schema import PipelineFields


def _has_adapters(config: PipelineFields) -> bool:
    return "sft" in trained(config) and config.sft.lora.r > 0


def _adapters_are_whole(config: PipelineFields, layout: Layout) -> Refusal | None:
    if not _has_adapters(config) or layout.tp == 1:
        return None
    return Refusal(
        f"tp_size={layout.tp} with sft.lora.r={config.sft.lora.r}",
        "tensor parallelism cuts the matrices that adapters are put on, and adapters are not cut",
        "Use --tp-size 1 (--sp-size, --pp-size and --dp-size work), or --set sft.lora.r=0",
    )


def _frozen_experts_are_nobodys_copies(config: PipelineFields, layout: Layout) -> Refusal | None:
    if not _has_adapters(config) or layout.ep == 1 or layout.zero_stage == 0:
        return None
    return Refusal(
        f"zero_stage={layout.zero_stage} with ep_size={layout.ep} and sft.lora.r={config.sft.lora.r}",
        "DeepSpeed takes frozen experts, which differ from rank to rank, for copies of each other",
        "Use --zero-stage 0 (the optimizer holds adapters alone), or --ep-size 1",
    )


def _every_rank_has_an_adapter(config: PipelineFields, layout: Layout) -> Refusal | None:
    lora, model = config.sft.lora, config.model
    if not _has_adapters(config):
        return None
    parts = stage_layers(model, num_stages(layout.schedule, layout.pp), layout.pp_layout)
    for rank in range(layout.pp):
        held = [parts[stage] for stage in parts_of(layout.schedule, layout.pp, rank)]
        if not any(adapter_params(model, layers, lora.r, lora.target_modules) for layers in held):
            return Refusal(
                f"pp_size={layout.pp} with sft.lora.target_modules={lora.target_modules}",
                f"pipeline rank {rank} has no layer of these names, and so nothing to train",
                "Use --pp-size 1, or leave sft.lora.target_modules empty for those of attention",
            )
    return None


LORA_RULES: dict[str, Callable[[PipelineFields, Layout], Refusal | None]] = {
    "adapters are not cut by tp": _adapters_are_whole,
    "ZeRO does not know frozen experts": _frozen_experts_are_nobodys_copies,
    "every pipeline rank has an adapter": _every_rank_has_an_adapter,
}

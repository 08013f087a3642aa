"""Which layouts of ranks can run: one table of rules. A refusal gives the value, the reason and the way out.

Knows settings and numbers of ranks. Starts nothing, does not import torch. `choice` finds what does work.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from model.parallel.placement import PARTS_PER_RANK, V_SHAPED, num_stages, stage_layers
from ray_pipeline.layout.layout import Layout, Refusal
from ray_pipeline.layout.model_rules import MODEL_RULES, Check, models
from ray_pipeline.settings.chain import trained
from ray_pipeline.settings.schema import PipelineFields


def batches(config: PipelineFields) -> dict[str, int]:
    """Key -> rows per optimizer step, over all ranks. DPO's pairs are padded to what the layout needs."""
    grpo, stages = config.grpo, trained(config)
    rows = {
        f"{stage}.batch_size": getattr(config, stage).batch_size
        for stage in ("pretrain", "sft", "distillation")
        if stage in stages
    }
    if "grpo" in stages:
        sampled = grpo.prompts_per_step * grpo.group_size // grpo.updates_per_rollout
        rows["grpo.prompts_per_step x group_size / updates_per_rollout"] = sampled
    return rows


def shared(config: PipelineFields, key: str) -> int:
    """The greatest number that divides `key` of every model: an axis that cuts it must divide this."""
    return gcd(*(getattr(model, key) for _, model in models(config)))


def _largest_divisor(number: int, below: int) -> int:
    return next((size for size in range(below - 1, 0, -1) if number % size == 0), 1)


def _sizes_multiply(config: PipelineFields, layout: Layout) -> Refusal | None:
    others = layout.pp * layout.tp * layout.sp
    product = layout.dp * others
    if product == layout.gpus:
        return None
    return Refusal(
        f"gpus={layout.gpus}",
        f"pp_size={layout.pp} x dp_size={layout.dp} x tp_size={layout.tp} x sp_size={layout.sp} "
        f"is {product} rank{'s' if product > 1 else ''}, not {layout.gpus}",
        f"Use --gpus {product}" if layout.gpus % others else f"Use --dp-size {layout.gpus // others}",
    )


def _schedule_has_a_pipeline(config: PipelineFields, layout: Layout) -> Refusal | None:
    if layout.schedule == "1f1b" or layout.pp > 1:
        return None
    return Refusal(
        f"schedule={layout.schedule}",
        "it orders the work of several pipeline ranks, and pp_size=1",
        "Use --schedule 1f1b, or --pp-size 2",
    )


def _zero_3_has_one_part(config: PipelineFields, layout: Layout) -> Refusal | None:
    if layout.zero_stage < 3 or PARTS_PER_RANK[layout.schedule] == 1:
        return None
    return Refusal(
        f"zero_stage=3 with schedule={layout.schedule}",
        "two parts of the model on a rank would gather weights that the other part still reads",
        f"Use --schedule 1f1b, or --zero-stage {1 if layout.schedule in V_SHAPED else 2}",
    )


def _zero_2_has_whole_backward(config: PipelineFields, layout: Layout) -> Refusal | None:
    if layout.zero_stage < 2 or layout.schedule not in V_SHAPED:
        return None
    return Refusal(
        f"zero_stage={layout.zero_stage} with schedule={layout.schedule}",
        "gradients are reduced while backward makes them, and this schedule makes weight gradients later",
        "Use --zero-stage 1, or --schedule 1f1b",
    )


def _offload_has_zero(config: PipelineFields, layout: Layout) -> Refusal | None:
    if not layout.offload_optimizer or layout.zero_stage >= 2:
        return None
    return Refusal(
        "offload_optimizer=true",
        f"only ZeRO 2 and 3 keep optimizer state in CPU memory, and zero_stage={layout.zero_stage}",
        "Use --zero-stage 2, or --no-offload-optimizer",
    )


def _experts_fit_replicas(config: PipelineFields, layout: Layout) -> Refusal | None:
    replicas = layout.dp * layout.sp
    if replicas % layout.ep == 0:
        return None
    return Refusal(
        f"ep_size={layout.ep}",
        f"experts are spread over dp_size={layout.dp} x sp_size={layout.sp} = {replicas} replicas, which "
        f"{layout.ep} does not divide",
        f"Use --ep-size {gcd(replicas, layout.ep)}, or more replicas",
    )


def _layers_fill_stages(config: PipelineFields, layout: Layout) -> Refusal | None:
    stages = num_stages(layout.schedule, layout.pp)
    for key, model in models(config):
        layers = model.num_hidden_layers
        if layers < stages:
            parts = stages // layout.pp
            given = f" with schedule={layout.schedule}, {stages} parts of the model" if parts > 1 else ""
            most = layers // parts
            return Refusal(
                f"pp_size={layout.pp}{given}",
                f"more {'parts' if parts > 1 else 'ranks'} than layers ({key}.num_hidden_layers={layers}); "
                f"every {'part' if parts > 1 else 'pipeline rank'} needs a layer",
                f"Use --pp-size {most} or less" if most else "Use --schedule 1f1b",
            )
    return None


def _pp_layout_fits(config: PipelineFields, layout: Layout) -> Refusal | None:
    if layout.pp_layout is None:
        return None
    try:
        stage_layers(config.model, num_stages(layout.schedule, layout.pp), layout.pp_layout)
    except ValueError as error:
        value, _, rest = str(error).partition(": ")
        reason, _, way_out = rest.partition(". ")
        return Refusal(value, reason, way_out.rstrip("."))
    return None


def _heads_are_shared(config: PipelineFields, layout: Layout) -> Refusal | None:
    ranks, heads = layout.tp * layout.sp, shared(config, "num_attention_heads")
    if heads % ranks == 0:
        return None
    if heads % layout.tp:
        value, way_out = f"tp_size={layout.tp}", f"--tp-size {_largest_divisor(heads, layout.tp)}"
    else:
        value, way_out = f"sp_size={layout.sp}", f"--sp-size {_largest_divisor(heads // layout.tp, layout.sp)}"
        value += f" with tp_size={layout.tp}" if layout.tp > 1 else ""
    key, model = next((key, model) for key, model in models(config) if model.num_attention_heads % ranks)
    return Refusal(
        value,
        f"each rank attends with its share of the heads, and {key}.num_attention_heads={model.num_attention_heads} "
        f"cannot be shared evenly by {ranks} ranks",
        f"Use {way_out}, the largest that works",
    )


def _sequence_is_cut(config: PipelineFields, layout: Layout) -> Refusal | None:
    length = config.data.seq_len
    if length % layout.sp == 0:
        return None
    rounded = -(-length // layout.sp) * layout.sp
    if rounded > config.model.max_position_embeddings:
        rounded -= layout.sp
    return Refusal(
        f"sp_size={layout.sp}",
        f"data.seq_len={length} cannot be cut into {layout.sp} equal pieces",
        f"Use --sp-size {_largest_divisor(length, layout.sp)}" + (f", or --seq-len {rounded}" if rounded else ""),
    )


def _widths_are_shared(config: PipelineFields, layout: Layout) -> Refusal | None:
    for key, model in models(config):
        for name in ("intermediate_size", "moe_intermediate_size", "vocab_size"):
            width = getattr(model, name)
            if width % layout.tp:
                largest, fitting = _largest_divisor(shared(config, name), layout.tp), -(-width // layout.tp) * layout.tp
                return Refusal(
                    f"tp_size={layout.tp}",
                    f"{key}.{name}={width} cannot be cut into {layout.tp} equal parts",
                    f"Use --tp-size {largest}, or --set {key}.{name}={fitting}",
                )
    return None


def _experts_are_shared(config: PipelineFields, layout: Layout) -> Refusal | None:
    for key, model in models(config):
        experts = model.n_routed_experts
        if experts % layout.ep:
            return Refusal(
                f"ep_size={layout.ep}",
                f"{key}.n_routed_experts={experts} cannot be shared evenly by {layout.ep} ranks",
                f"Use --ep-size {_largest_divisor(shared(config, 'n_routed_experts'), layout.ep)}",
            )
    return None


def _rows_divide(config: PipelineFields, layout: Layout) -> Refusal | None:
    for key, count in batches(config).items():
        if count % layout.dp:
            return Refusal(
                f"dp_size={layout.dp}",
                f"{key}={count} rows cannot be shared evenly by {layout.dp} replicas",
                f"Use --dp-size {_largest_divisor(gcd(*batches(config).values()), layout.dp)}, or other rows per step",
            )
    return None


def _dualpipev_is_filled(config: PipelineFields, layout: Layout) -> Refusal | None:
    if layout.schedule != "dualpipev":
        return None
    needed, rows = 2 * layout.pp, config.layout.micro_batch
    for key, count in batches(config).items():
        if key.startswith("grpo"):
            continue  # rollouts decide the rows of a step; they are padded to as many micro-batches as are needed
        micro_batches = -(-count // layout.dp // rows)
        if micro_batches < needed:
            return Refusal(
                f"schedule=dualpipev with pp_size={layout.pp}",
                f"needs at least {needed} micro-batches per rank and step, and {key}={count} gives {micro_batches} "
                f"with dp_size={layout.dp} and layout.micro_batch={rows}",
                f"Use a smaller layout.micro_batch, {key} of {needed * layout.dp * rows}, or --schedule zbv",
            )
    return None


def _elastic_range_is_legal(config: PipelineFields, layout: Layout) -> Refusal | None:
    least = layout.min_gpus
    if least is None or least == layout.gpus:
        return None
    if least > layout.gpus:
        return Refusal(f"min_gpus={least}", f"more than gpus={layout.gpus}", f"Use --min-gpus {layout.gpus} or less")
    if elastic_layouts(config, layout)[1:]:
        return None
    fewer = elastic_layouts(config, replace(layout, min_gpus=1))[1:]
    return Refusal(
        f"min_gpus={least}",
        f"lost ranks are made up for by fewer data-parallel replicas of {layout.gpus // layout.dp} "
        f"rank(s) each, and no dp_size below {layout.dp} works with {least} to {layout.gpus - 1} ranks",
        f"Use --min-gpus {fewer[0].gpus}" if fewer else "Omit --min-gpus, or use a larger --dp-size",
    )


# Order matters: the first rule that a layout breaks is the one in the message.
RULES: dict[str, Check] = {
    "pp x dp x tp x sp is the number of ranks": _sizes_multiply,
    "schedules with two parts per rank need pp > 1": _schedule_has_a_pipeline,
    "ZeRO 3 needs one part per rank": _zero_3_has_one_part,
    "ZeRO 2 and 3 need whole backward passes": _zero_2_has_whole_backward,
    "offloading needs ZeRO 2 or 3": _offload_has_zero,
    "ep divides dp x sp": _experts_fit_replicas,
    "every part of the pipeline has a layer": _layers_fill_stages,
    "--pp-layout fits the model": _pp_layout_fits,
    "attention heads are shared evenly by tp x sp": _heads_are_shared,
    "rows are cut evenly by sp": _sequence_is_cut,
    "widths and vocabulary are cut evenly by tp": _widths_are_shared,
    "experts are shared evenly by ep": _experts_are_shared,
    "rows of a step are shared evenly by dp": _rows_divide,
    "dualpipev needs 2 x pp micro-batches": _dualpipev_is_filled,
    **MODEL_RULES,
    "fewer ranks than --gpus can go on": _elastic_range_is_legal,
}


def refusal(config: PipelineFields, layout: Layout) -> tuple[str, Refusal] | None:
    """The first rule of the table that `layout` breaks, and how; None for a layout that can run `config`."""
    for rule, check in RULES.items():
        if (refused := check(config, layout)) is not None:
            return rule, refused
    return None


def broken_rule(config: PipelineFields, layout: Layout) -> str | None:
    """Why `layout` cannot run `config` and what to do, in a sentence or two; None if it can."""
    found = refusal(config, layout)
    return None if found is None else str(found[1])


def elastic_layouts(config: PipelineFields, layout: Layout) -> list[Layout]:
    """`layout`, and what it may shrink to when workers are lost: fewer replicas, down to `min_gpus` ranks.

    Pipeline, tensor and sequence parallelism stay; ep shrinks where it must. Legal ones only, largest first.
    """
    others = layout.gpus // layout.dp
    out = [layout]
    for dp in range(layout.dp - 1, 0, -1):
        if dp * others < (layout.min_gpus or layout.gpus):
            break
        smaller = replace(layout.on_ranks(dp * others), min_gpus=None)
        if refusal(config, smaller) is None:
            out.append(replace(smaller, min_gpus=layout.min_gpus))
    return out

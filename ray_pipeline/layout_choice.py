"""Chooses the layout a run gets: what was asked for, with the open sizes filled in, or the nearest one that works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import gcd, log2, prod
from typing import Any, Literal

from model.parallel.placement import PARTS_PER_RANK
from ray_pipeline.config import PipelineFields
from ray_pipeline.errors import UserError
from ray_pipeline.layout import Layout
from ray_pipeline.layout_rules import batches, broken_rule, models, refusal, shared

# From the one that asks most of a layout to the one that asks nothing: a refused schedule gives way to a neighbour.
_SCHEDULES = ("dualpipev", "zbv", "interleaved_1f1b", "1f1b")


def nearest_legal(config: PipelineFields, wanted: Layout, most_gpus: int) -> Layout:
    """The layout that works with the fewest settings changed, on at most `most_gpus` ranks.

    Among equals: the one with as many ranks as wanted, then the one with the least changed sizes.
    """
    values = _candidates(config, wanted, most_gpus)
    if wanted.gpus <= most_gpus and refusal(config, wanted) is None:
        return wanted
    for changes in range(1, len(values) + 1):
        legal = [found for found in _changed(wanted, values, changes, most_gpus) if refusal(config, found) is None]
        if legal:
            return min(legal, key=lambda found: _distance(wanted, found))
    raise AssertionError("one rank without any option breaks no rule")


def _candidates(config: PipelineFields, wanted: Layout, most_gpus: int) -> dict[str, list[Any]]:
    """Setting -> the values it could be changed to; those that no other setting could make legal are left out."""
    layers = min(model.num_hidden_layers for _, model in models(config))
    widths = ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")
    sizes: dict[str, Sequence[int]] = {
        "pp": range(1, min(layers, most_gpus) + 1),
        "dp": _divisors(gcd(*batches(config).values()), most_gpus),
        "tp": _divisors(gcd(*(shared(config, key) for key in widths)), most_gpus),
        "sp": _divisors(gcd(shared(config, "num_attention_heads"), config.data.seq_len), most_gpus),
        "ep": _divisors(shared(config, "n_routed_experts"), most_gpus),
    }
    values: dict[str, list[Any]] = {
        "gpus": [],  # follows from the others; in the table so that changing it counts
        **{axis: [size for size in found if size != getattr(wanted, axis)] for axis, found in sizes.items()},
        "zero_stage": [stage for stage in range(wanted.zero_stage)],
        "schedule": [name for name in _SCHEDULES if name != wanted.schedule],
        "pp_layout": [] if wanted.pp_layout is None else [None],
        "offload_optimizer": [False] if wanted.offload_optimizer else [],
        "min_gpus": [] if wanted.min_gpus is None else [None],
    }
    if wanted.offload_optimizer:
        values["zero_stage"] += [stage for stage in (2, 3) if stage > wanted.zero_stage]
    return values


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _changed(wanted: Layout, values: dict[str, list[Any]], changes: int, most_gpus: int) -> Iterator[Layout]:
    """Layouts that differ from `wanted` in exactly `changes` settings, the number of ranks among them."""
    for keys in combinations(values, changes):
        axes = tuple(key for key in keys if key != "gpus")
        for found in _assignments(wanted, {key: values[key] for key in axes}, most_gpus):
            if (found.gpus != wanted.gpus) == ("gpus" in keys):
                yield found


def _assignments(wanted: Layout, values: dict[str, list[Any]], most_gpus: int) -> Iterator[Layout]:
    if not values:
        gpus = prod((wanted.pp, wanted.dp, wanted.tp, wanted.sp))
        if gpus <= most_gpus:
            yield replace(wanted, gpus=gpus)
        return
    key, *others = values
    rest = {other: values[other] for other in others}
    ranks = prod(getattr(wanted, axis) for axis in ("pp", "dp", "tp", "sp") if axis != key and axis not in rest)
    for value in values[key]:
        if key in ("pp", "dp", "tp", "sp") and ranks * value > most_gpus:
            break  # values ascend
        yield from _assignments(replace(wanted, **{key: value}), rest, most_gpus)


def _distance(wanted: Layout, found: Layout) -> tuple[float, ...]:
    """Missing ranks first, then by how much sizes changed, then what was given up besides."""
    sizes = sum(abs(log2(size / found.sizes()[axis])) for axis, size in wanted.sizes().items())
    schedule = abs(_SCHEDULES.index(wanted.schedule) - _SCHEDULES.index(found.schedule)) / 4
    given_up = schedule + abs(wanted.zero_stage - found.zero_stage) + (wanted.offload_optimizer > found.offload_optimizer)
    return abs(found.gpus - wanted.gpus), sizes, given_up, PARTS_PER_RANK[found.schedule]


def resolve_layout(config: PipelineFields, gpus_available: int, cpu_only: bool = False) -> Layout:
    """The layout a run gets on a machine with `gpus_available` GPUs.

    `gpus` unset means every GPU there is, or as many CPU ranks as the axes ask for (one, if they ask for none);
    `dp_size` unset takes what the other axes leave. On Modal the GPUs are there by asking.

    Raises:
        UserError: GPUs that are not there, or a layout that breaks a rule; names the nearest one that works.
    """
    device = choose_device(config, gpus_available, cpu_only)
    limited = device == "cuda" and config.backend != "modal"
    layout = _fill_in(config, gpus_available if limited else 0, device)
    gpus = layout.gpus
    if limited and gpus > gpus_available:
        best = nearest_legal(config, layout, gpus_available)
        raise UserError(
            f"gpus={gpus}: this machine has {_count(gpus_available, 'GPU')}. "
            f"Use {best.flags()}, or --backend cpu for CPU ranks, or --backend modal."
        )
    reason = broken_rule(config, layout)
    if reason is not None:
        best = nearest_legal(config, layout, gpus_available if limited else max(gpus, layout.pp))
        raise UserError(f"{reason} Nearest layout that works: {best.flags()}.")
    return layout


def choose_device(config: PipelineFields, gpus_available: int, cpu_only: bool) -> Literal["cpu", "cuda"]:
    """Where ranks compute.

    Raises:
        UserError: `backend: cuda` on a machine without GPUs.
    """
    if config.backend == "modal":
        return "cuda"
    if config.backend == "cuda" and (gpus_available == 0 or cpu_only):
        raise UserError(
            "backend=cuda: this machine has no GPU that PyTorch can use. Use --backend cpu, --backend modal, or see "
            "`ray-pipeline doctor`."
        )
    return "cpu" if config.backend == "cpu" or cpu_only or gpus_available == 0 else "cuda"


def _fill_in(config: PipelineFields, available: int, device: Literal["cpu", "cuda"]) -> Layout:
    """The layout asked for, with what was left open: gpus from the axes, dp from gpus, both from what there is."""
    asked = config.layout
    others = asked.pp_size * asked.tp_size * asked.sp_size
    axes = {"pp": asked.pp_size, "tp": asked.tp_size, "ep": asked.ep_size, "sp": asked.sp_size}

    def with_dp(dp: int) -> Layout:
        return Layout(
            gpus=asked.gpus or others * dp,
            dp=dp,
            **axes,
            zero_stage=asked.zero_stage,
            device=device,
            schedule=asked.schedule,
            pp_layout=asked.pp_layout,
            activation_checkpointing=asked.activation_checkpointing,
            offload_optimizer=asked.offload_optimizer,
            min_gpus=asked.min_gpus,
        )

    if asked.dp_size is not None:
        return with_dp(asked.dp_size)
    if asked.gpus is not None:
        return with_dp(max(1, asked.gpus // others))
    # Nobody asked for a number of GPUs: rather leave one idle than refuse because a batch does not divide.
    usable = [with_dp(dp) for dp in range(max(1, available // others), 0, -1)]
    return next((layout for layout in usable if broken_rule(config, layout) is None), usable[0])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def device_notice(config: PipelineFields, layout: Layout) -> str | None:
    """One line when CPU ranks stand in for the GPUs that `--gpus` asked for."""
    if layout.device == "cpu" and config.backend == "auto" and config.layout.gpus is not None:
        processes = "process" if layout.gpus == 1 else "processes"
        return f"no GPU here: {layout.gpus} CPU worker {processes} over gloo"
    return None



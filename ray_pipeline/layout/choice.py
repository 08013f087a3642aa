"""Chooses the layout a run gets: what was asked for, with the open sizes filled in, or the nearest one that works."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import product
from math import gcd, log2
from typing import Any, Literal

from ray_pipeline.errors import UserError, command
from ray_pipeline.layout.layout import Layout, layout_of
from ray_pipeline.layout.model_rules import models
from ray_pipeline.layout.rules import batches, broken_rule, refusal, shared
from ray_pipeline.settings.layout_config import LayoutOptions
from ray_pipeline.settings.schema import PipelineFields

# From the one that asks most of a layout to the one that asks nothing: a refused schedule gives way to a neighbour.
_SCHEDULES = ("dualpipev", "zbv", "interleaved_1f1b", "1f1b")


def nearest_legal(config: PipelineFields, wanted: Layout, most_gpus: int) -> Layout:
    """The layout that works with the fewest settings changed, on at most `most_gpus` ranks.

    Among equals: the one with as many ranks as wanted, then the one with the least changed sizes.
    """
    sizes = _by_changes(wanted, sizes_up_to(config, most_gpus))
    options = _by_changes(wanted, _options(wanted))
    for changes in range(len(fields(Layout)) + 1):
        pairs = (pair for i, found in sizes.items() for pair in product(found, options.get(changes - i, ())))
        layouts = (replace(wanted, **size, **option) for size, option in pairs)
        legal = [layout for layout in layouts if refusal(config, layout) is None]
        if legal:
            return min(legal, key=lambda layout: _distance(wanted, layout))
    raise AssertionError("one rank without any option breaks no rule")


def sizes_up_to(config: PipelineFields, most_gpus: int) -> Iterator[dict[str, Any]]:
    """Sizes of every axis, and `gpus`, of up to `most_gpus` ranks; none that break a rule whatever the others are."""
    layers = min(model.num_hidden_layers for _, model in models(config))
    heads, experts = shared(config, "num_attention_heads"), shared(config, "n_routed_experts")
    widths = (shared(config, key) for key in ("intermediate_size", "moe_intermediate_size", "vocab_size"))
    rows = gcd(*batches(config).values())
    for tp in _divisors(gcd(heads, *widths), most_gpus):
        for sp in _divisors(gcd(heads // tp, config.data.seq_len), most_gpus // tp):
            for dp in _divisors(rows, most_gpus // (tp * sp)):
                for pp in range(1, min(layers, most_gpus // (tp * sp * dp)) + 1):
                    for ep in _divisors(gcd(experts, dp * sp), dp * sp):
                        yield {"gpus": pp * dp * tp * sp, "pp": pp, "dp": dp, "tp": tp, "sp": sp, "ep": ep}


def _options(wanted: Layout) -> Iterator[dict[str, Any]]:
    """What is not a size: as wanted, or given up."""
    choices: dict[str, Iterable[Any]] = {
        "zero_stage": range(4) if wanted.offload_optimizer else range(wanted.zero_stage + 1),
        "schedule": _SCHEDULES,
        "activation_checkpointing": [wanted.activation_checkpointing],  # no rule refuses it
    }
    for option in fields(LayoutOptions):
        choices.setdefault(option.name, dict.fromkeys([getattr(wanted, option.name), option.default]))
    return (dict(zip(choices, values, strict=True)) for values in product(*choices.values()))


def _by_changes(wanted: Layout, found: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Number of settings that differ from the wanted ones -> settings."""
    out: dict[int, list[dict[str, Any]]] = {}
    for values in found:
        out.setdefault(sum(value != getattr(wanted, key) for key, value in values.items()), []).append(values)
    return out


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number or most, most) + 1) if number % size == 0]


def _distance(wanted: Layout, found: Layout) -> tuple[float, ...]:
    """Missing ranks first, then by how much sizes changed, then what was given up besides."""
    sizes = sum(abs(log2(size / found.sizes()[axis])) for axis, size in wanted.sizes().items())
    schedule = abs(_SCHEDULES.index(wanted.schedule) - _SCHEDULES.index(found.schedule)) / len(_SCHEDULES)
    return abs(found.gpus - wanted.gpus), sizes, schedule + abs(wanted.zero_stage - found.zero_stage), found.pp


def resolve_layout(
    config: PipelineFields, gpus_available: int, cpu_only: bool = False, *, there: str = "this machine"
) -> Layout:
    """The layout a run gets on a machine, or a cluster, with `gpus_available` GPUs.

    `gpus` unset means every GPU there is, or as many CPU ranks as the axes ask for (one, if they ask for none);
    `dp_size` unset takes what the other axes leave. On Modal the GPUs are there by asking.

    Raises:
        UserError: GPUs that are not there, or a layout that breaks a rule; names the nearest one that works.
    """
    device = choose_device(config, gpus_available, cpu_only, there=there)
    limited = device == "cuda" and config.backend != "modal"
    layout = _fill_in(config, gpus_available if limited else 0, device)
    gpus = layout.gpus
    if limited and gpus > gpus_available:
        best = nearest_legal(config, layout, gpus_available)
        raise UserError(
            f"gpus={gpus}: {there} has {_count(gpus_available, 'GPU')}. "
            f"Use {best.flags()}, or --backend cpu for CPU ranks, or --backend modal."
        )
    reason = broken_rule(config, layout)
    if reason is not None:
        best = nearest_legal(config, layout, gpus_available if limited else max(gpus, layout.pp))
        raise UserError(f"{reason} Nearest layout that works: {best.flags()}.")
    return layout


def choose_device(
    config: PipelineFields, gpus_available: int, cpu_only: bool, *, there: str = "this machine"
) -> Literal["cpu", "cuda"]:
    """Where ranks compute.

    Raises:
        UserError: `backend: cuda` where there are no GPUs.
    """
    if config.backend == "modal":
        return "cuda"
    if config.backend == "cuda" and (gpus_available == 0 or cpu_only):
        raise UserError(
            f"backend=cuda: {there} has no GPU that PyTorch can use. Use --backend cpu, --backend modal, or see "
            f"`{command('doctor')}`."
        )
    return "cpu" if config.backend == "cpu" or cpu_only or gpus_available == 0 else "cuda"


def _fill_in(config: PipelineFields, available: int, device: Literal["cpu", "cuda"]) -> Layout:
    """The layout asked for, with what was left open: gpus from the axes, dp from gpus, both from what there is."""
    found = layout_of(config.layout, device)
    if config.layout.dp_size is not None or config.layout.gpus is not None:
        return found
    # Nobody asked for a number of GPUs: rather leave one idle than refuse because a batch does not divide.
    usable = [replace(found, gpus=found.gpus * dp, dp=dp) for dp in range(max(1, available // found.gpus), 0, -1)]
    return next((layout for layout in usable if broken_rule(config, layout) is None), usable[0])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def device_notice(config: PipelineFields, layout: Layout) -> str | None:
    """One line when CPU ranks stand in for the GPUs that `--gpus` asked for."""
    if layout.device == "cpu" and config.backend == "auto" and config.layout.gpus is not None:
        processes = "process" if layout.gpus == 1 else "processes"
        return f"no GPU here: {layout.gpus} CPU worker {processes} over gloo"
    return None

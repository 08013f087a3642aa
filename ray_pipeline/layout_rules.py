"""Which layouts of ranks can run: one table of rules, each with value, reason and the nearest layout that works.

Knows settings and numbers of GPUs. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ray_pipeline.config import PipelineFields
from ray_pipeline.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Ranks along every axis. gpus = pp * dp * tp * sp processes; ep is carved out of dp * sp."""

    gpus: int = 1
    pp: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1
    sp: int = 1
    zero_stage: int = 0
    device: Literal["cpu", "cuda"] = "cpu"

    def flags(self) -> str:
        """How to ask for this layout on the command line."""
        sizes = {"pp": self.pp, "dp": self.dp, "tp": self.tp, "ep": self.ep, "sp": self.sp}
        given = [f"--{axis}-size {size}" for axis, size in sizes.items() if size > 1]
        zero = [f"--zero-stage {self.zero_stage}"] if self.zero_stage else []
        return " ".join([f"--gpus {self.gpus}", *given, *zero])

    def describe(self) -> str:
        """`3 CPU ranks: pp=3` for the plan."""
        sizes = {"pp": self.pp, "dp": self.dp, "tp": self.tp, "ep": self.ep, "sp": self.sp, "ZeRO": self.zero_stage}
        axes = " ".join(f"{name}={size}" for name, size in sizes.items() if size > (0 if name == "ZeRO" else 1))
        ranks = f"{self.gpus} {'GPU' if self.device == 'cuda' else 'CPU'} rank{'s' if self.gpus > 1 else ''}"
        return f"{ranks}: {axes}" if axes else ranks


def _sizes_multiply(config: PipelineFields, layout: Layout) -> str | None:
    product = layout.pp * layout.dp * layout.tp * layout.sp
    if product == layout.gpus:
        return None
    return (
        f"gpus={layout.gpus}: pp_size={layout.pp} x dp_size={layout.dp} x tp_size={layout.tp} x sp_size={layout.sp} "
        f"is {product} ranks, not {layout.gpus}"
    )


def _layers_fill_stages(config: PipelineFields, layout: Layout) -> str | None:
    for key, layers in (
        ("model.num_hidden_layers", config.model.num_hidden_layers),
        ("distillation.student.num_hidden_layers", config.distillation.student.num_hidden_layers),
    ):
        if layers < layout.pp:
            return f"pp_size={layout.pp}: more ranks than layers ({key}={layers}); every pipeline rank needs a layer"
    return None


def _axes_supported(config: PipelineFields, layout: Layout) -> str | None:
    axes = {"tp_size": layout.tp, "ep_size": layout.ep, "sp_size": layout.sp}
    for name, size in axes.items():
        if size > 1:
            return (
                f"{name}={size}: this engine splits a model over pipeline ranks (--pp-size) and rows over "
                f"data-parallel ranks (--dp-size); {_AXIS_NAMES[name]} is not in it"
            )
    return None


_AXIS_NAMES = {"tp_size": "tensor parallelism", "ep_size": "expert parallelism", "sp_size": "sequence parallelism"}


def _zero_supported(config: PipelineFields, layout: Layout) -> str | None:
    if layout.zero_stage <= 1:
        return None
    return (
        f"zero_stage={layout.zero_stage}: this engine shards optimizer state (--zero-stage 1); sharding gradients or "
        "weights too is not in it"
    )


def _rows_divide(config: PipelineFields, layout: Layout) -> str | None:
    grpo = config.grpo
    rows = {
        "pretrain.batch_size": config.pretrain.batch_size,
        "sft.batch_size": config.sft.batch_size,
        "distillation.batch_size": config.distillation.batch_size,
        "grpo.prompts_per_step x group_size / updates_per_rollout": grpo.prompts_per_step
        * grpo.group_size
        // grpo.updates_per_rollout,
    }
    for key, count in rows.items():
        if count % layout.dp:
            return f"dp_size={layout.dp}: {key}={count} rows cannot be shared evenly by {layout.dp} replicas"
    return None


# Order matters: the first rule that a layout breaks is the one that is told.
RULES: tuple[Callable[[PipelineFields, Layout], str | None], ...] = (
    _axes_supported,
    _zero_supported,
    _sizes_multiply,
    _layers_fill_stages,
    _rows_divide,
)


def broken_rule(config: PipelineFields, layout: Layout) -> str | None:
    """Why `layout` cannot run `config`, or None."""
    return next((reason for rule in RULES if (reason := rule(config, layout)) is not None), None)


def nearest_legal(config: PipelineFields, wanted: Layout, most_gpus: int) -> Layout:
    """The layout that works with the fewest changes: as many ranks as wanted if possible, then as many stages."""
    layers = min(config.model.num_hidden_layers, config.distillation.student.num_hidden_layers)
    candidates = [
        replace(wanted, gpus=pp * dp, pp=pp, dp=dp, tp=1, ep=1, sp=1, zero_stage=min(wanted.zero_stage, 1))
        for pp in range(1, min(layers, most_gpus) + 1)
        for dp in range(1, most_gpus // pp + 1)
    ]
    legal = [layout for layout in candidates if broken_rule(config, layout) is None]
    # pp=1, dp=1 breaks no rule, so there is always one.
    return min(legal, key=lambda found: (abs(found.gpus - wanted.gpus), abs(found.pp - wanted.pp), found.gpus))


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
        raise UserError(f"{reason}. Nearest layout that works: {best.flags()}.")
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
        return Layout(gpus=asked.gpus or others * dp, dp=dp, zero_stage=asked.zero_stage, device=device, **axes)

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


def with_layout(config: PipelineFields, layout: Layout) -> PipelineFields:
    """The settings with every size of the layout filled in."""
    sizes = {
        "gpus": layout.gpus,
        "pp_size": layout.pp,
        "dp_size": layout.dp,
        "tp_size": layout.tp,
        "ep_size": layout.ep,
        "sp_size": layout.sp,
    }
    return config.model_copy(update={"layout": config.layout.model_copy(update=sizes)})

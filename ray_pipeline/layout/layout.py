"""One arrangement of ranks, as plain data: how it is asked for, how it is told, and what a refusal of it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray_pipeline.settings.schema import PipelineFields


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
    schedule: str = "1f1b"
    pp_layout: str | None = None
    activation_checkpointing: str = "none"
    offload_optimizer: bool = False
    min_gpus: int | None = None

    def sizes(self) -> dict[str, int]:
        """Axis -> number of ranks along it."""
        return {"pp": self.pp, "dp": self.dp, "tp": self.tp, "sp": self.sp, "ep": self.ep}

    def flags(self) -> str:
        """How to ask for this layout on the command line."""
        out = [f"--gpus {self.gpus}", *(f"--{axis}-size {size}" for axis, size in self.sizes().items() if size > 1)]
        if self.zero_stage:
            out.append(f"--zero-stage {self.zero_stage}")
        if self.schedule != "1f1b":
            out.append(f"--schedule {self.schedule}")
        if self.pp_layout is not None:
            out.append(f'--pp-layout "{self.pp_layout}"')  # a shell would take | for a pipe
        if self.activation_checkpointing != "none":
            out.append(f"--activation-checkpointing {self.activation_checkpointing}")
        if self.offload_optimizer:
            out.append("--offload-optimizer")
        if self.min_gpus is not None:
            out.append(f"--min-gpus {self.min_gpus}")
        return " ".join(out)

    def axes(self) -> str:
        """`pp=2 dp=2 ZeRO=1 zbv`: what is not the default; empty for one plain rank."""
        out = [f"{name}={size}" for name, size in self.sizes().items() if size > 1]
        if self.zero_stage:
            out.append(f"ZeRO={self.zero_stage}")
        if self.schedule != "1f1b":
            out.append(self.schedule)
        if self.pp_layout is not None:
            out.append(self.pp_layout)
        if self.activation_checkpointing != "none":
            out.append(f"checkpointing={self.activation_checkpointing}")
        if self.offload_optimizer:
            out.append("offload")
        if self.min_gpus is not None:
            out.append(f"min_gpus={self.min_gpus}")
        return " ".join(out)

    def describe(self) -> str:
        """`3 CPU ranks: pp=3` for the plan."""
        axes = self.axes()
        ranks = f"{self.gpus} {'GPU' if self.device == 'cuda' else 'CPU'} rank{'s' if self.gpus > 1 else ''}"
        return f"{ranks}: {axes}" if axes else ranks


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot run: `value: reason. way_out.`"""

    value: str
    reason: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}. {self.way_out}."


def with_layout(config: PipelineFields, layout: Layout) -> PipelineFields:
    """The settings with everything of the layout filled in."""
    values = {
        "gpus": layout.gpus,
        "pp_size": layout.pp,
        "dp_size": layout.dp,
        "tp_size": layout.tp,
        "ep_size": layout.ep,
        "sp_size": layout.sp,
        "zero_stage": layout.zero_stage,
        "schedule": layout.schedule,
        "pp_layout": layout.pp_layout,
        "activation_checkpointing": layout.activation_checkpointing,
        "offload_optimizer": layout.offload_optimizer,
        "min_gpus": layout.min_gpus,
    }
    return config.model_copy(update={"layout": config.layout.model_copy(update=values)})


def stored_layout(config: PipelineFields, device: Literal["cpu", "cuda"]) -> Layout:
    """Inverse of `with_layout`."""
    stored = config.layout
    others = stored.pp_size * stored.tp_size * stored.sp_size
    gpus = stored.gpus or others * (stored.dp_size or 1)
    return Layout(
        gpus=gpus, pp=stored.pp_size, dp=gpus // others, tp=stored.tp_size, ep=stored.ep_size, sp=stored.sp_size,
        zero_stage=stored.zero_stage, device=device, schedule=stored.schedule, pp_layout=stored.pp_layout,
        activation_checkpointing=stored.activation_checkpointing, offload_optimizer=stored.offload_optimizer,
        min_gpus=stored.min_gpus,
    )  # fmt: skip

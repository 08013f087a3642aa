"""The arrangement of ranks as plain data, with its flags for the command line, its line for the plan, and refusals."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import gcd, prod
from typing import Any, Literal

from model.parallel.grid import MeshSizes
from ray_pipeline.settings.layout_config import LayoutConfig, LayoutOptions
from ray_pipeline.settings.schema import PipelineFields

Device = Literal["cpu", "cuda"]
# How an option that is not its default is named in a line; others are named as they are.
_SHORT = {
    "zero_stage": "ZeRO={}", "schedule": "{}", "pp_layout": "{}", "activation_checkpointing": "checkpointing={}",
    "offload_optimizer": "offload",
}  # fmt: skip


@dataclass(frozen=True)
class Layout(LayoutOptions, MeshSizes):
    """Ranks along every axis, options, number of ranks and device: the one form from the plan to the mesh.

    gpus = pp * dp * tp * sp processes in a legal layout; ep is carved out of dp * sp.
    """

    gpus: int = 1
    device: Device = "cpu"

    def sizes(self) -> dict[str, int]:
        """Axis -> number of ranks along it."""
        return {axis: getattr(self, axis) for axis in ("pp", "dp", "tp", "sp", "ep")}

    def options(self) -> dict[str, Any]:
        """Options that are not their defaults."""
        values = {option.name: (getattr(self, option.name), option.default) for option in fields(LayoutOptions)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def flags(self) -> str:
        """How to ask for this layout on the command line."""
        out = [f"--gpus {self.gpus}", *(f"--{axis}-size {size}" for axis, size in self.sizes().items() if size > 1)]
        for name, value in self.options().items():
            text = f'"{value}"' if "|" in str(value) else value  # a shell would take | for a pipe
            out.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
        return " ".join(out)

    def axes(self) -> str:
        """`pp=2 dp=2 ZeRO=1 zbv`: what is not the default; empty for one plain rank."""
        sizes = [f"{name}={size}" for name, size in self.sizes().items() if size > 1]
        return " ".join(
            [*sizes, *(_SHORT.get(name, f"{name}={{}}").format(value) for name, value in self.options().items())]
        )

    def describe(self) -> str:
        """`3 CPU ranks: pp=3` for the plan."""
        axes = self.axes()
        ranks = f"{self.gpus} {'GPU' if self.device == 'cuda' else 'CPU'} rank{'s' if self.gpus > 1 else ''}"
        return f"{ranks}: {axes}" if axes else ranks

    def on_ranks(self, world: int) -> Layout:
        """The layout on `world` ranks: what the other axes leave is data parallel, however many ranks are there.

        Raises:
            ValueError: they cannot hold the other axes.
        """
        others = self.pp * self.tp * self.sp
        if world % others:
            raise ValueError(f"{world} ranks cannot hold pp x tp x sp = {others}")
        dp = world // others
        # Fewer replicas hold more experts each.
        return replace(self, gpus=world, dp=dp, ep=gcd(self.ep, dp * self.sp) if world < self.gpus else self.ep)


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot run: `value: reason. way_out.`"""

    value: str
    reason: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}. {self.way_out}."


def layout_of(asked: LayoutConfig, device: Device = "cpu") -> Layout:
    """The layout that the settings name, legal or not; sizes left open follow from the others, or are one."""
    sizes = {axis.name: getattr(asked, f"{axis.name}_size") for axis in fields(MeshSizes)}
    others = prod(size for axis, size in sizes.items() if axis not in ("dp", "ep"))
    gpus = asked.gpus or others * (sizes["dp"] or 1)
    sizes["dp"] = sizes["dp"] or max(1, gpus // others)
    options = {option.name: getattr(asked, option.name) for option in fields(LayoutOptions)}
    return Layout(gpus=gpus, device=device, **sizes, **options)


def with_layout(config: PipelineFields, layout: Layout) -> PipelineFields:
    """The settings with everything of the layout filled in, of which `layout_of` is the inverse."""
    sizes = {f"{axis}_size": size for axis, size in layout.sizes().items()}
    options = {option.name: getattr(layout, option.name) for option in fields(LayoutOptions)}
    filled = config.layout.model_copy(update={"gpus": layout.gpus, **sizes, **options})
    return config.model_copy(update={"layout": filled})

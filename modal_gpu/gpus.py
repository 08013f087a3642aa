"""Which GPUs Modal rents, how many one container may have, and how a run is cut into containers. No modal here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.layout.layout import Layout
from ray_pipeline.layout.rules import broken_rule
from ray_pipeline.settings.schema import PipelineFields

DATE, SOURCE = "2026-11", "modal.com/docs/guide/gpu and /multi-node-clusters"
CPU = "CPU"
MOST_HOSTS = 32


@dataclass(frozen=True)
class GpuType:
    """A type by Modal's name. most: GPUs of one container. joins: whether whole hosts of it join into a cluster."""

    name: str
    most: int = 8
    joins: bool = False


# CPU is no type of Modal's: a container without GPUs, for CPU ranks.
TYPES = (
    GpuType("T4"), GpuType("L4"), GpuType("A10", most=4), GpuType("L40S"), GpuType("A100", joins=True),
    GpuType("A100-40GB", joins=True), GpuType("A100-80GB", joins=True), GpuType("RTX-PRO-6000"),
    GpuType("H100", joins=True), GpuType("H100!", joins=True), GpuType("H200", joins=True),
    GpuType("B200", joins=True), GpuType("B200+", joins=True), GpuType("B300", joins=True), GpuType(CPU, most=64),
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What trains: `hosts` containers with `each` GPUs of the first of `types` that is free.

    Attributes:
        cpus, memory_mib: of each container.
    """

    types: tuple[str, ...]
    hosts: int
    each: int
    cpus: float = 0.0
    memory_mib: int = 0

    @property
    def on_cpu(self) -> bool:
        """Whether the containers have no GPU."""
        return self.types == (CPU,)

    def gpu(self) -> str | list[str] | None:
        """As Modal takes it: `H100:3`, or a list of such in the order they are tried."""
        if self.on_cpu:
            return None
        names = [f"{name}:{self.each}" for name in self.types]
        return names[0] if len(names) == 1 else names

    def describe(self) -> str:
        """`3 x H100`, `16 x H100 on 2 hosts`, `3 x H100, else A100-80GB`."""
        text = f"{self.hosts * self.each} x {self.types[0]}" + (" ranks" if self.on_cpu else "")
        text += "".join(f", else {name}" for name in self.types[1:])
        return text if self.hosts == 1 else f"{text} on {self.hosts} hosts"


def _known(name: str) -> GpuType:
    for found in TYPES:
        if found.name == name.upper():
            return found
    names = [found.name for found in TYPES]
    raise UserError(
        f"--gpu-type {name}: Modal has no such GPU{did_you_mean(name.upper(), names)}. The types are "
        f"{', '.join(names)} (CPU: ranks without one); several with commas are tried in that order."
    )


def gpu_types(text: str) -> list[GpuType]:
    """`H100,A100-80GB` -> the types, first choice first.

    Raises:
        UserError: a type that Modal does not have, or CPU among others.
    """
    found = [_known(name.strip()) for name in text.split(",") if name.strip()]
    if not found:
        raise UserError("--gpu-type: empty. Name a GPU, for example H100.")
    if len(found) > 1 and any(each.name == CPU for each in found):
        raise UserError(f"--gpu-type {text}: CPU cannot stand among GPUs, as ranks are made for one of them.")
    return found


def shape_of(config: PipelineFields, layout: Layout) -> Shape:
    """The containers for a layout.

    Raises:
        UserError: a type Modal does not have, or a number of GPUs that it cannot place.
    """
    types = gpu_types(config.modal.gpu_type)
    most = min(found.most for found in types)
    names, gpus = tuple(found.name for found in types), layout.gpus
    if gpus <= most:
        return Shape(names, 1, gpus)
    single = [found.name for found in types if not found.joins]
    if single:
        raise UserError(
            f"gpus={gpus}: one Modal container has at most {most} of {', '.join(names)}, and those of "
            f"{', '.join(single)} do not join. Use --gpus {most} or fewer, or --gpu-type H100."
        )
    if gpus % most:
        below, above = gpus // most * most, (gpus // most + 1) * most
        raise UserError(
            f"gpus={gpus}: Modal joins whole hosts of {most} GPUs alone. Use --gpus {below} or --gpus {above}."
        )
    if gpus // most > MOST_HOSTS:
        raise UserError(
            f"gpus={gpus}: Modal joins at most {MOST_HOSTS} hosts ({SOURCE}, {DATE}). Use --gpus {MOST_HOSTS * most}."
        )
    return Shape(names, gpus // most, most)


def trained_layout(config: PipelineFields, layout: Layout) -> Layout:
    """The layout that ranks get there: on CPUs with --gpu-type CPU.

    Raises:
        UserError: CPU ranks cannot run it.
    """
    if config.modal.gpu_type.strip().upper() != CPU:
        return layout
    layout = replace(layout, device="cpu")
    reason = broken_rule(config, layout)
    if reason is not None:
        raise UserError(f"--gpu-type CPU: {reason}")
    return layout

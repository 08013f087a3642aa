"""What a stage's memory is held against: the device of every rank, and the CPU memory of a node."""

from __future__ import annotations

from collections.abc import Sequence

from ray_pipeline.costs.hardware_table import Hardware
from ray_pipeline.costs.held import Memory
from ray_pipeline.costs.workload import Workload

PROCESS = 4 << 30  # bytes of CPU memory of a rank that imported torch and Ray and opened CUDA


def device_bytes(work: Workload, memory: Memory, hardware: Hardware) -> int:
    """Bytes of a rank that its device has to hold; ranks on CPUs share one memory, and what lies there once."""
    if hardware.device != "cpu":
        return memory.total
    return memory.total + sum(memory.host.values()) + sum(work.copies.once.values()) // work.layout.gpus


def host_bytes(work: Workload, memory: Sequence[Memory], hardware: Hardware) -> tuple[int, int]:
    """Bytes of CPU memory that the first node needs, and those it has; both 0 where ranks compute on CPUs.

    Args:
        memory: of every pipeline rank; a node holds as many of the fullest as it has devices.
    """
    if hardware.device == "cpu":
        return 0, 0
    ranks = min(work.layout.gpus, hardware.node)
    each = max(sum(m.host.values()) for m in memory)
    return ranks * (PROCESS + each) + sum(work.copies.once.values()), ranks * hardware.host

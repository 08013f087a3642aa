"""Clocks, kernel counts and peak memory of a call, on a GPU or, as far as it goes, on a CPU."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP, CALLS = 3, 10


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the median of ten after three that do not count; on a CPU of two after one."""
    warm_up, calls = (WARM_UP, CALLS) if device.type == "cuda" else (1, 2)
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(calls):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Of one call: launched kernels, milliseconds in which they run, the five longest. On a CPU: operations."""
    from torch.profiler import ProfilerActivity, profile

    call()
    wait(device)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as found:
        call()
        wait(device)
    if device.type != "cuda":
        return {"operations": sum(event.count for event in found.key_averages())}
    launched = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    by_name: collections.Counter[str] = collections.Counter()
    for event in launched:
        by_name[event.name[:80]] += event.device_time
    longest = {name: spent / 1e3 for name, spent in by_name.most_common(5)}
    return {"launches": len(launched), "busy_ms": sum(by_name.values()) / 1e3, "longest_ms": longest}


def peak(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Bytes allocated before a call and at its peak; nothing on a CPU, where torch does not count."""
    if device.type != "cuda":
        call()
        return {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    wait(device)
    return {
        "bytes_before": before,
        "bytes_peak": torch.cuda.max_memory_allocated(device),
        "bytes_reserved": torch.cuda.max_memory_reserved(device),
    }

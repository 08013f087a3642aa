"""What this machine has. Facts only; nothing here decides or prints. Heavy packages are imported inside functions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "ray",
    "deepspeed",
    "transformers",
    "datasets",
    "tokenizers",
    "wandb",
    "modal",
    "gguf",
    "xllamacpp",
)
# The releases that the tests run with, of libraries whose private interfaces are used; pyproject.toml bounds them.
TESTED = {"torch": "2.13", "deepspeed": "0.19", "ray": "2.60"}
HOSTS = {"Hugging Face": "huggingface.co", "Weights & Biases": "api.wandb.ai", "Modal": "api.modal.com"}
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. memory_gib: all of it."""

    name: str
    memory_gib: float
    capability: str


def gpus() -> list[Gpu]:
    """The CUDA devices PyTorch can use (CUDA_VISIBLE_DEVICES counts)."""
    if not has_nvidia_driver():
        return []
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Gpu(properties.name, properties.total_memory / _GIB, f"{properties.major}.{properties.minor}"))
    return found


def count_gpus() -> int:
    """Number of usable CUDA devices. Without an NVIDIA driver this answers without importing torch (over a second)."""
    if not has_nvidia_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def computes_fp8(gpu: str) -> bool:
    """Whether a GPU of this name has the tensor cores that `model.kernels.cuda.fp8_kernel` multiplies on: Hopper's."""
    return any(kind in gpu.upper() for kind in HOPPER)


def fp8_refusal(stage: str, gpu: str) -> str:
    """Why fp8 does not start there, and the ways out."""
    return (
        f"{stage}.precision=fp8: {gpu} has no tensor cores that it can use here (an H100's, H200's or H800's), so "
        "every product would be computed in fp32, several times slower than bf16. Use precision=bf16, or for the "
        "same numbers all the same, layout.emulate_fp8=true."
    )


def has_nvidia_driver() -> bool:
    """Whether the kernel side of CUDA is there (Linux, WSL)."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg"))


def num_cpus() -> int:
    """Cores this process may use: the affinity mask and a container's CPU quota, not the whole host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_text(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def memory_gib() -> tuple[float, float]:
    """(total, available) main memory; a container's limit counts."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = _read_text(Path("/sys/fs/cgroup/memory.max")).strip()
    if limit.isdigit():
        used = _read_text(Path("/sys/fs/cgroup/memory.current")).strip()
        total = min(total, int(limit))
        available = min(available, int(limit) - int(used) if used.isdigit() else total)
    return total / _GIB, available / _GIB


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def disk_gib(folder: Path) -> float:
    """Free space where `folder` is or would be."""
    return shutil.disk_usage(existing_parent(folder)).free / _GIB


def write_error(folder: Path) -> str | None:
    """Why nothing can be written in `folder` (or its nearest existing parent), or None when a file could be."""
    parent = existing_parent(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".write-test-"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def versions() -> dict[str, str | None]:
    """Installed versions of what the pipeline is built on; None where a package is missing. Imports none of them."""
    out: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = None
    return out


def untested(installed: Mapping[str, str | None]) -> str | None:
    """One line on installed releases that are other ones than `TESTED`; None where all are these."""
    others = {
        name: version
        for name, tested in TESTED.items()
        if (version := installed.get(name)) is not None and not f"{version}.".startswith(f"{tested}.")
    }
    if not others:
        return None
    there = ", ".join(f"{name} {version}" for name, version in others.items())
    tested = " ".join(f'"{name}=={TESTED[name]}.*"' for name in others)
    return f"{there}: not tested with this program; if something fails, pip install {tested}"


def torch_facts() -> dict[str, Any]:
    """What PyTorch was built with and can reach."""
    import torch
    import torch.distributed as dist

    nccl = None
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "cuda_build": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "nccl": nccl,
        "gloo": dist.is_gloo_available(),
        "bf16_gpu": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    }


def reachable(host: str, timeout: float) -> bool:
    """Whether https://`host` answers anything, through the environment's proxy where there is one."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(f"https://{host}", timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def network(timeout: float = 3.0) -> dict[str, bool]:
    """Reachability of the services the pipeline can use, asked at once; no answer in `timeout` seconds is a no."""
    answers = dict.fromkeys(HOSTS, False)

    def ask(name: str) -> None:
        answers[name] = reachable(HOSTS[name], timeout)

    # Daemon threads: resolving a name can hang for longer than any timeout given to urlopen.
    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in HOSTS]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


def keys(env: Mapping[str, str], home: Path) -> dict[str, bool]:
    """Which credentials are present, by variable or by file; never their values."""
    modal_file = Path(env.get("MODAL_CONFIG_PATH", str(home / ".modal.toml")))
    netrc = _read_text(home / ".netrc")
    return {
        "WANDB_API_KEY": bool(env.get("WANDB_API_KEY")) or "api.wandb.ai" in netrc,
        "HF_TOKEN": bool(env.get("HF_TOKEN")) or (home / ".cache/huggingface/token").is_file(),
        "MODAL_TOKEN": bool(env.get("MODAL_TOKEN_ID") and env.get("MODAL_TOKEN_SECRET"))
        or all(env.get(f"MODAL_OAUTH_{part}") for part in ("REFRESH_TOKEN", "CLIENT_ID", "CLIENT_SECRET"))
        or modal_file.is_file(),
    }


def machine() -> dict[str, str]:
    """Operating system and Python."""
    system = f"{platform.system()} {platform.release()}"
    return {"system": system, "machine": platform.machine(), "python": sys.version.split()[0]}

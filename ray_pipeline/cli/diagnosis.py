"""What the facts of a machine mean for this pipeline: what works, what does not, what to do. Pure; prints nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ray_pipeline import hardware
from ray_pipeline.hardware import Gpu

OPTIONAL_PACKAGES = ("modal", "wandb", "xllamacpp")
MIN_MEMORY_GIB = 3.0  # three ranks of the tiny recipe with Ray
MIN_DISK_GIB = 2.0  # a run of the tiny recipe with its checkpoints


@dataclass(frozen=True)
class Facts:
    """One machine. Memory and disk in GiB; `sandbox` is why programs of a model cannot be run, None where they can."""

    system: dict[str, str]
    packages: dict[str, str | None]
    gpus: list[Gpu]
    torch: dict[str, Any]
    cpus: int
    memory_gib: float
    memory_free_gib: float
    disk_free_gib: float
    output_dir: str
    write_error: str | None
    network: dict[str, bool]
    keys: dict[str, bool]
    driver: bool
    sandbox: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """works: what can be done here. advice: what to do for more. missing: what must be fixed before any run."""

    works: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def gather(output_dir: str) -> Facts:
    """Ask the machine. Takes some seconds (torch is imported, three hosts are tried)."""
    import os
    from pathlib import Path

    from ray_pipeline.isolation.sandbox import sandbox_problem

    packages = hardware.versions()
    has_torch = packages["torch"] is not None
    total, available = hardware.memory_gib()
    folder = Path(output_dir)
    return Facts(
        system=hardware.machine(),
        packages=packages,
        gpus=hardware.gpus() if has_torch else [],
        torch=hardware.torch_facts() if has_torch else {},
        cpus=hardware.num_cpus(),
        memory_gib=total,
        memory_free_gib=available,
        disk_free_gib=hardware.disk_gib(folder),
        output_dir=str(folder.absolute()),
        write_error=hardware.write_error(folder),
        network=hardware.network(),
        keys=hardware.keys(os.environ, Path.home()),
        driver=hardware.has_nvidia_driver(),
        sandbox=sandbox_problem(),
    )


def diagnose(facts: Facts) -> Diagnosis:
    """Judge the facts."""
    result = Diagnosis()
    _essentials(facts, result)
    _compute(facts, result)
    _services(facts, result)
    return result


def _essentials(facts: Facts, result: Diagnosis) -> None:
    absent = [name for name, version in facts.packages.items() if version is None and name not in OPTIONAL_PACKAGES]
    if absent:
        result.missing.append(f"packages {', '.join(absent)}: run ./scripts/setup, or pip install -e .")
    if other := hardware.untested(facts.packages):
        result.advice.append(other)
    if facts.write_error is not None:
        result.missing.append(f"{facts.output_dir}: cannot be written ({facts.write_error}); give another --output-dir")
    if facts.disk_free_gib < MIN_DISK_GIB:
        result.missing.append(
            f"disk: {facts.disk_free_gib:.1f} GiB free where {facts.output_dir} is, {MIN_DISK_GIB:.0f} GiB are needed "
            "for the tiny recipe; free some or give another --output-dir"
        )
    if facts.memory_free_gib < MIN_MEMORY_GIB:
        result.missing.append(
            f"memory: {facts.memory_free_gib:.1f} GiB available, {MIN_MEMORY_GIB:.0f} GiB are needed for the tiny "
            "recipe with three ranks; close other programs, or use --gpus 1"
        )


def _compute(facts: Facts, result: Diagnosis) -> None:
    if facts.torch.get("gloo"):
        result.works.append(f"CPU ranks over gloo, {facts.cpus} cores: run --gpus 3 --pp-size 3")
    elif facts.torch:
        result.missing.append("gloo: this PyTorch has none, so ranks cannot talk; install the official build of torch")
    if facts.gpus:
        over = "over NCCL" if facts.torch.get("nccl") else "WITHOUT NCCL"
        result.works.append(f"{len(facts.gpus)} GPU rank(s) {over}: run --gpus {len(facts.gpus)}")
        if not facts.torch.get("nccl") and len(facts.gpus) > 1:
            result.advice.append("NCCL is missing from this PyTorch: use --gpus 1, or install the official CUDA build")
        if not facts.torch.get("bf16_gpu"):
            result.advice.append("this GPU has no bf16: use recipes with precision: fp32")
    elif facts.driver and facts.torch and facts.torch.get("cuda_build") is None:
        result.advice.append("there is an NVIDIA driver, but PyTorch is a CPU build: reinstall torch with CUDA")
    elif facts.driver and facts.torch:
        result.advice.append(
            f"there is an NVIDIA driver, but PyTorch (CUDA {facts.torch['cuda_build']}) sees no GPU: compare the "
            "driver's version in nvidia-smi, and CUDA_VISIBLE_DEVICES"
        )
    else:
        result.advice.append("no GPU: recipes above tiny are slow here; rent GPUs with --backend modal --gpu-type H100")


def _services(facts: Facts, result: Diagnosis) -> None:
    if facts.sandbox is None:
        result.works.append('programs of a model in a sandbox: the reward "code", the tool "python", tasks of code')
    else:
        result.advice.append(facts.sandbox)
    if facts.network["Hugging Face"]:
        result.works.append("data and tokenizers by name from the Hugging Face Hub")
        if not facts.keys["HF_TOKEN"]:
            result.advice.append("for gated or private data sets: huggingface-cli login, or HF_TOKEN")
    else:
        result.advice.append("no way to huggingface.co: built-in data and local files work, data sets by name do not")
    if facts.packages["wandb"] and facts.keys["WANDB_API_KEY"] and facts.network["Weights & Biases"]:
        result.works.append("Weights & Biases online")
    elif facts.packages["wandb"]:
        result.works.append("Weights & Biases offline (files in the run's folder; wandb sync sends them)")
        if not facts.keys["WANDB_API_KEY"]:
            result.advice.append("for W&B online: wandb login, or WANDB_API_KEY")
    if facts.packages["modal"] and facts.keys["MODAL_TOKEN"] and facts.network["Modal"]:
        result.works.append("rented GPUs: run --backend modal")
    elif not facts.keys["MODAL_TOKEN"]:
        result.advice.append("for rented GPUs (--backend modal): make an account at modal.com, then modal token new")
    if facts.packages["xllamacpp"]:
        result.works.append("EXPORT compares its GGUF files in llama.cpp")
    else:
        result.advice.append('for GGUF checks in llama.cpp: pip install "ray-pipeline[llama]"')


def as_dict(facts: Facts, diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything, JSON-able."""
    return {**asdict(facts), **asdict(diagnosis), "ok": not diagnosis.missing}

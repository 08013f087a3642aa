"""What devices can do, from their makers' data sheets, and what share of it training gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.launch.cluster import Cluster
from ray_pipeline.settings.schema import PipelineFields

TERA, GIGA = 10**12, 10**9
PROCESS = 600 << 20  # bytes of a process that imported torch and Ray


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        bf16, fp32: peak dense matrix FLOP/s (fp32: without TF32). memory: bytes.
        intra, inter: bytes/s that a device can send, to its node and to other nodes.
        achieved: share of the peak that a training step's matrix products get; links get `links` of theirs.
        reserved: bytes that no tensor can use: CUDA context, NCCL's channels, fragments of the allocator.
        node: devices per node. host: bytes of CPU memory that a node has for each of them.
        launch: seconds to start one operation from Python; a device is never quicker than its operations are started.
    """

    name: str
    title: str
    bf16: float
    fp32: float
    memory: int
    intra: float
    inter: float
    reserved: int = 4 * GIGA
    achieved: float = 0.5
    links: float = 0.8
    node: int = 8
    device: str = "cuda"
    host: int = 256 * GIGA  # of 2 TB in a DGX H100's, H200's or A100's node of eight
    launch: float = 5e-6

    def peak(self, bf16: bool) -> float:
        """FLOP/s in the precision of the matrix products."""
        return self.bf16 if bf16 else self.fp32


# `achieved`: an H200 reaches 0.8 of its bf16 peak in large matrix products alone; attention, norms, routing and small
# experts bring a step down. DeepSeek-V3's published 180K H800 hours per trillion tokens (arXiv:2412.19437, table 1) are
# 0.4 of the bf16 peak for its 260 GFLOP per token, in fp8 and with all communication overlapped.
_DEVICES = (
    # A100 datasheet (nvidia.com/a100): NVLink 600 GB/s both ways; 200 Gb/s HDR InfiniBand per GPU in DGX A100.
    Hardware("a100-40gb", "A100 40 GB SXM", 312 * TERA, 19.5 * TERA, 40 * GIGA, 300 * GIGA, 25 * GIGA),
    Hardware("a100-80gb", "A100 80 GB SXM", 312 * TERA, 19.5 * TERA, 80 * GIGA, 300 * GIGA, 25 * GIGA),
    # H100 datasheet (nvidia.com/h100), SXM: 1979 TFLOP/s with sparsity; NVLink 900 GB/s both ways; 400 Gb/s per GPU.
    Hardware("h100", "H100 SXM", 989 * TERA, 67 * TERA, 80 * GIGA, 450 * GIGA, 50 * GIGA),
    # H200 datasheet (nvidia.com/h200): the H100 with 141 GB.
    Hardware("h200", "H200 SXM", 989 * TERA, 67 * TERA, 141 * GIGA, 450 * GIGA, 50 * GIGA),
    # The H100 with NVLink of 400 GB/s both ways; eight 400 Gb/s InfiniBand ports a node (arXiv:2505.09343, §4).
    Hardware("h800", "H800 SXM", 989 * TERA, 67 * TERA, 80 * GIGA, 200 * GIGA, 50 * GIGA),
    # HGX B200 datasheet, one of eight: 4.5 PFLOP/s with sparsity, 180 GB, NVLink 1.8 TB/s both ways; 400 Gb/s per GPU.
    Hardware("b200", "B200 SXM", 2250 * TERA, 75 * TERA, 180 * GIGA, 900 * GIGA, 50 * GIGA),
)
_ALIASES = {"a100": "a100-80gb", "h100!": "h100", "h100-80gb": "h100"}
# Ray's names of accelerators that are others here; an A100 whose memory it does not tell is taken for the smaller one.
_RAY_NAMES = {"A100": "a100-40gb", "A100-40G": "a100-40gb", "A100-80G": "a100-80gb", "": "unknown"}
_CPU = "cpu"
NAMES = (*(device.name for device in _DEVICES), _CPU)


def find_hardware(name: str) -> Hardware:
    """The device called `name`, in any spelling that Modal or people use.

    Raises:
        UserError: naming what is in the table.
    """
    asked = name.strip().lower().split(":")[0]
    asked = _ALIASES.get(asked, asked)
    if asked == _CPU:
        return this_cpu()
    for device in _DEVICES:
        if device.name == asked:
            return device
    known = ", ".join(NAMES)
    raise UserError(f"--hardware {name}: not in the table{did_you_mean(asked, NAMES)}. It has {known}.")


def peak_of(title: str, precision: str) -> float | None:
    """Peak FLOP/s of the GPU that the driver calls `title` ("NVIDIA H100 80GB HBM3"); None where it is not known."""
    words = title.lower().replace("-", " ").split()
    device = next((d for d in _DEVICES if d.name.partition("-")[0] in words), None)
    return None if device is None else device.peak(precision != "fp32")


def rented_hardware(config: PipelineFields) -> Hardware:
    """The GPU that `modal.gpu_type` names; of several the one with the least memory, as any of them may be had.

    Raises:
        UserError: naming what is in the table.
    """
    found = [find_hardware(name.rstrip("+ ")) for name in config.modal.gpu_type.split(",")]
    return min(found, key=lambda device: device.memory)


def default_hardware(config: PipelineFields) -> Hardware:
    """What the settings would run on: this machine's CPU, or the GPU that `modal.gpu_type` names."""
    if config.backend == "cpu":
        return this_cpu()
    try:
        return rented_hardware(config)
    except UserError as error:
        text = str(error).replace("--hardware ", "modal.gpu_type=", 1)
        raise UserError(f"{text} Name one with --hardware to plan for it.") from None


def running_hardware(config: PipelineFields, device: str, cluster: Cluster | None = None) -> Hardware | None:
    """What ranks here, on Modal or in a Ray cluster will have; None for GPUs that are not known, or not there."""
    if config.backend == "modal":
        try:
            return rented_hardware(config)
        except UserError:
            return None
    if cluster is not None:
        return _cluster_cpus(cluster) if device == "cpu" else _cluster_gpus(cluster)
    if device == "cpu":
        return this_cpu()
    from ray_pipeline.hardware import gpus, memory_gib

    found = gpus()
    if not found:  # the launcher refuses such ranks
        return None
    smallest = min(found, key=lambda gpu: gpu.memory_gib)
    host = int(memory_gib()[0] * 2**30) // len(found)
    return replace(
        find_hardware("h100"), name="gpu", title=smallest.name, memory=int(smallest.memory_gib * 2**30), host=host,
        node=len(found),
    )  # fmt: skip


def _cluster_cpus(cluster: Cluster) -> Hardware:
    """All CPUs and their memory as one, of which `for_ranks` gives each rank its part."""
    cores, memory = int(sum(node.cpus for node in cluster.nodes)), sum(node.memory for node in cluster.nodes)
    title = f"the cluster's CPUs ({cores} cores)"
    return replace(this_cpu(), title=title, bf16=cores * 60 * GIGA, fp32=cores * 60 * GIGA, memory=memory)


def _cluster_gpus(cluster: Cluster) -> Hardware | None:
    """The smallest kind of GPU among the machines; None where Ray names none of the table."""
    found = []
    for node in [node for node in cluster.nodes if node.gpus]:
        try:
            kind = find_hardware(_RAY_NAMES.get(node.accelerator, node.accelerator))
        except UserError:
            return None
        found.append(replace(kind, host=node.memory // node.gpus, node=node.gpus))
    return min(found, key=lambda kind: (kind.memory, kind.host), default=None)


def this_cpu() -> Hardware:
    """This machine, of which `for_ranks` gives each rank its part: conservative figures for gloo and one thread a rank.

    One thread of a server's CPU was seen to give the tiny recipe's training step 30 GFLOP/s and a model of 100M
    parameters 70, several threads less each; 0.5 GB/s is little for gloo between processes of one machine.
    """
    from ray_pipeline.hardware import memory_gib, num_cpus

    cores, memory = num_cpus(), int(memory_gib()[0] * 2**30)
    return Hardware(
        _CPU, f"this machine's CPU ({cores} cores)", cores * 60 * GIGA, cores * 60 * GIGA, memory, GIGA // 2, GIGA // 2,
        reserved=PROCESS, achieved=0.4, node=1 << 20, device="cpu",
    )  # fmt: skip


def for_ranks(hardware: Hardware, ranks: int) -> Hardware:
    """What one of `ranks` ranks has: a GPU is its own, a CPU and its memory are shared."""
    if hardware.device != "cpu":
        return hardware
    share = replace(hardware, memory=hardware.memory // ranks)
    return replace(share, bf16=hardware.bf16 / ranks, fp32=hardware.fp32 / ranks)

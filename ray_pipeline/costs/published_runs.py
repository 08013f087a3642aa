"""Training runs whose step time was published with their layout, as data: what `plan` has to explain.

Layouts and features are as published; where a source leaves one open, its line says what was taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from model.config import ModelConfig
from ray_pipeline.costs.featured_step import Explained, FeaturedStep
from ray_pipeline.costs.features import Features
from ray_pipeline.costs.fit import judge
from ray_pipeline.costs.hardware_table import TERA, find_hardware
from ray_pipeline.costs.timing import flops_per_token, step_timing
from ray_pipeline.costs.workload import Workload
from ray_pipeline.layout.layout import Layout


@dataclass(frozen=True)
class Run:
    """One published run.

    Attributes:
        seconds: published, of one optimizer step. sets: the share of `features` that it was used to set.
    """

    name: str
    seconds: float
    hardware: str
    work: Workload
    features: Features
    source: str
    sets: str | None = None

    @cached_property
    def planned(self) -> Explained:
        """The step as the planner explains it."""
        return FeaturedStep(self.work, find_hardware(self.hardware), self.features).explain()

    @property
    def error(self) -> float:
        """How much longer the planned step is, as a share of the published one."""
        return self.planned.seconds / self.seconds - 1

    def with_features(self, **changes: Any) -> float:
        """Seconds of the same with other features."""
        return replace(self, features=replace(self.features, **changes)).planned.seconds

    @cached_property
    def ours(self) -> tuple[float, Workload]:
        """What this engine takes in the same layout, and its work: bf16, and no more computed again than memory asks.

        As many ranks hold all experts: here they are shared out among replicas, and cut over tensor-parallel ranks.
        """
        layout, hardware = self.work.layout, find_hardware(self.hardware)
        schedule = "interleaved_1f1b" if self.features.chunks > 1 else layout.schedule
        plain = replace(layout, schedule=schedule, zero_stage=1, ep=max(1, layout.ep // layout.tp))
        lean = replace(self.work, node=hardware.node, fp8_dispatch=self.features.fp8_dispatch)
        for again in ("none", "selective", "full"):
            work = replace(lean, layout=replace(plain, activation_checkpointing=again))
            if again == "full" or judge(work, hardware).fits_device:
                break
        return step_timing(work, hardware).seconds, work

    @property
    def ours_in_8_bits(self) -> float:
        """Seconds of the same with tokens sent to experts in FP8."""
        work = replace(self.ours[1], fp8_dispatch=True)
        return step_timing(work, find_hardware(self.hardware)).seconds

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it, in seconds."""
        ours, work = self.ours
        return {
            "run": self.name, "source": self.source, "published": self.seconds, "planned": self.planned.seconds,
            "error": self.error, "shares": self.planned.shares, "features": vars(self.features), "sets": self.sets,
            "hardware": self.hardware, "layout": vars(self.work.layout), "ours": ours, "our_layout": vars(work.layout),
        }  # fmt: skip


V3 = ModelConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    first_k_dense_replace=3, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
    topk_group=4, num_nextn_predict_layers=1,
)  # fmt: skip
_GROUPED = ModelConfig(attention="gqa", num_nextn_predict_layers=0, n_shared_experts=0, first_k_dense_replace=999)
_QWEN3 = replace(
    _GROUPED, vocab_size=151936, first_k_dense_replace=0, num_key_value_heads=4, head_dim=128, n_routed_experts=128,
    num_experts_per_tok=8,
)  # fmt: skip
QWEN3_235B = replace(_QWEN3, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, moe_intermediate_size=1536)
QWEN3_30B = replace(_QWEN3, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, moe_intermediate_size=768)
LLAMA_405B = replace(
    _GROUPED, vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
    num_attention_heads=128, num_key_value_heads=8, head_dim=128,
)  # fmt: skip
LLAMA_70B = replace(LLAMA_405B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
# Two matrices of four (Nemotron: of 73728) widths are three of two thirds of that.
NEMOTRON_340B = replace(
    _GROUPED, vocab_size=256000, hidden_size=18432, intermediate_size=49152, num_hidden_layers=96,
    num_attention_heads=96, num_key_value_heads=8, head_dim=192,
)  # fmt: skip


def _gpt(hidden: int, layers: int, heads: int) -> ModelConfig:
    return replace(
        _GROUPED, vocab_size=51200, hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
        num_attention_heads=heads, head_dim=hidden // heads,
    )  # fmt: skip


def _work(model: ModelConfig, gpus: int, rows: int, seq_len: int, **axes: Any) -> Workload:
    """One row at a time; what the other axes leave is data parallel."""
    layout = Layout(device="cuda", **axes)
    layout = replace(layout, gpus=gpus, dp=gpus // (layout.pp * layout.tp * layout.sp))
    ahead = model.num_nextn_predict_layers > 0
    return Workload(
        "pretrain", model, layout, rows=rows, seq_len=seq_len, micro_batch=1, steps=1, bf16=True, trains_mtp=ahead
    )


_LLAMA_3 = _work(LLAMA_405B, 16384, 2048, 8192, tp=8, pp=16)
_H100_V3 = {"tp": 2, "pp": 8, "ep": 64}
# "Et|(tt|)*30mL": the last rank has six layers, the MTP module and the head.
_MEGATRON_V3 = Features(chunks=4, last_layers=6, recomputes="cheap", overlaps_gradients=False)
_NEMO_V3 = Features(recomputes="cheap", dispatch="by expert")
_QWEN3_STEP = Features(chunks=4, last_layers=11, recomputes="cheap")
_NEMOTRON_STEP = Features(chunks=12, last_layers=12, overlaps_tp=True)
_LLAMA_STEP = Features(chunks=7, last_layers=14, overlaps_tp=True)
_GPT_STEP = Features(chunks=3, fused_attention=False, recomputes="all")

_BRIDGE = "github.com/NVIDIA-NeMo/Megatron-Bridge, "
_DGX = "github.com/NVIDIA/dgxc-benchmarking, "
_ZOO = "github.com/yanring/Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md"
_OVERLAP = _BRIDGE + "skills/nemo-mbridge-perf-moe-comm-overlap/SKILL.md"
_GPT_TABLE = "arXiv:2205.05198, table 5"

RUNS = (
    Run(
        "DeepSeek-V3, 2048 H800, FP8, DualPipe", 15360 * 4096 / 1e12 * 180e3 * 3600 / 2048, "h800",
        _work(V3, 2048, 15360, 4096, pp=16, ep=64, schedule="dualpipev"),
        Features(fp8=True, recomputes="cheap", fp8_dispatch=True, overlaps_dispatch=True),
        "arXiv:2412.19437, table 1 (180K GPU hours per trillion tokens) and section 3.2",
    ),
    Run(
        "DeepSeek-V3, 1024 H100, bf16", 61.756, "h100", _work(V3, 1024, 16384, 4096, **_H100_V3), _MEGATRON_V3,
        _BRIDGE + "examples/model_verification_cards/deepseek-v3/card.yaml",
    ),
    Run(
        "DeepSeek-V3, 1024 H100, FP8", 8192 * 4096 / 1024 / 1297, "h100", _work(V3, 1024, 8192, 4096, **_H100_V3),
        replace(_MEGATRON_V3, fp8=True, overlaps_dispatch=True),
        _BRIDGE + "docs/performance-summary-archive.md, 25.09; overlap as in Megatron-MoE-ModelZoo's script for it",
    ),
    Run(
        "DeepSeek-V3, 512 H100, bf16, plain", 48.948, "h100", _work(V3, 512, 4096, 4096, **_H100_V3),
        replace(_NEMO_V3, last_layers=6), _DGX + "deepseek_v3/pretraining/README.md, v25.05.04; NeMo's all-to-all",
    ),
    Run(
        "Qwen3-235B, 256 H100, bf16", 19.7, "h100", _work(QWEN3_235B, 256, 2048, 4096, tp=2, pp=8, ep=32),
        _QWEN3_STEP, _ZOO, sets="GROUPED",
    ),
    Run(
        "Qwen3-235B, 256 H100, bf16, overlap", 17.6, "h100",
        _work(QWEN3_235B, 256, 2048, 4096, tp=2, pp=8, ep=32), replace(_QWEN3_STEP, overlaps_dispatch=True), _ZOO,
    ),
    Run("Qwen3-30B, 16 H100, bf16", 24.7138, "h100", _work(QWEN3_30B, 16, 1024, 4096, ep=16), Features(), _OVERLAP),
    Run(
        "Qwen3-30B, 16 H100, bf16, overlap", 20.992, "h100", _work(QWEN3_30B, 16, 1024, 4096, ep=16),
        Features(overlaps_dispatch=True), _OVERLAP,
    ),
    Run(
        "Llama 3 405B, 16384 H100, bf16", flops_per_token(_LLAMA_3) * _LLAMA_3.tokens_per_step / 16384 / (400 * TERA),
        "h100", _LLAMA_3, Features(chunks=8, last_layers=7), "arXiv:2407.21783, table 4: 400 TFLOP/s a GPU, 3.3.2",
    ),
    Run(
        "Llama 3 405B, 1152 H100, bf16", 17.52, "h100", _work(LLAMA_405B, 1152, 504, 8192, tp=8, pp=9, sp=2),
        _LLAMA_STEP, _DGX + "llama3.1/README_405b.md, 24.09", sets="sustained, H100",
    ),
    Run(
        "Llama 3 405B, 1152 H100, FP8", 11.31, "h100", _work(LLAMA_405B, 1152, 504, 8192, tp=8, pp=9, sp=2),
        replace(_LLAMA_STEP, fp8=True), _DGX + "llama3.1/README_405b.md, 24.09",
    ),
    Run(
        "Llama 3 70B, 64 H100, FP8", 256 * 8192 / 64 / 1639, "h100", _work(LLAMA_70B, 64, 256, 8192, tp=4, pp=8),
        Features(chunks=5, last_layers=10, fp8=True, overlaps_tp=True),
        _BRIDGE + "docs/performance-summary-archive.md, 26.02.01",
    ),
    Run(
        "Nemotron-4 340B, 1024 H100, bf16", 4.73, "h100", _work(NEMOTRON_340B, 1024, 256, 4096, tp=8, pp=8),
        _NEMOTRON_STEP, _DGX + "nemotron/README_340b.md, 24.11",
    ),
    Run(
        "Nemotron-4 340B, 1024 H100, FP8", 3.34, "h100", _work(NEMOTRON_340B, 1024, 256, 4096, tp=8, pp=8),
        replace(_NEMOTRON_STEP, fp8=True), _DGX + "nemotron/README_340b.md, 24.11",
    ),
    Run(
        "GPT 175B, 64 A100, full recomputing", 18.13, "a100", _work(_gpt(12288, 96, 96), 64, 64, 2048, tp=8, pp=8),
        replace(_GPT_STEP, last_layers=12), _GPT_TABLE, sets="sustained, A100",
    ),
    Run(
        "GPT 175B, 64 A100, selective", 13.75, "a100",
        _work(_gpt(12288, 96, 96), 64, 64, 2048, tp=8, pp=8),
        replace(_GPT_STEP, last_layers=12, recomputes="attention"), _GPT_TABLE,
    ),
    Run(
        "GPT 530B, 280 A100, selective", 37.83, "a100",
        _work(_gpt(20480, 105, 128), 280, 280, 2048, tp=8, pp=35),
        replace(_GPT_STEP, last_layers=3, recomputes="attention"), _GPT_TABLE,
    ),
    Run(
        "GPT 1T, 512 A100, selective", 71.49, "a100",
        _work(_gpt(25600, 128, 160), 512, 512, 2048, tp=8, pp=64),
        replace(_GPT_STEP, chunks=1, last_layers=2, recomputes="attention"), _GPT_TABLE,
    ),
)  # fmt: skip

# The layout to aim for, and what single features are worth in it: without what it has, with what it lacks.
AIM = RUNS[1]
CHANGES: dict[str, dict[str, Any]] = {
    "as it was run": {},
    "a row for every expert, not for every node": {"dispatch": "by expert"},
    "tensor-parallel ranks send the same tokens": {"sequence_parallel": False},
    "backward repeats all of a layer, dispatch too": {"recomputes": "all"},
    "without all three": {"dispatch": "by expert", "sequence_parallel": False, "recomputes": "all"},
    "dispatch goes beside computing": {"overlaps_dispatch": True},
    "dispatch in FP8": {"fp8_dispatch": True},
    "with both": {"overlaps_dispatch": True, "fp8_dispatch": True},
}

"""Whole training steps: as on a CPU, without waiting for the device, and beside what `plan` says of them."""

from __future__ import annotations

import collections
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.attention.core import document_mask, document_positions
from model.build import use_fp8
from model.config import ModelConfig
from model.init import init_weights
from model.layers.rope import rotary_table
from model.parallel.mesh import Mesh, MeshSizes
from model.transformer import Transformer
from ray_pipeline.costs.estimate import make_plan
from ray_pipeline.costs.hardware_table import find_hardware
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.errors import UserError
from ray_pipeline.layout.layout import Layout
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import OptimizerConfig
from ray_pipeline.verification.cases import STAGES, TOLERANCES, Case, for_stage, small_subject
from ray_pipeline.verification.made_data import write_data
from ray_pipeline.verification.steps import take_steps
from ray_pipeline.verification.world import Verifier
from scripts.gpu_parts.operations import Facts
from scripts.gpu_parts.timed import kernels, milliseconds, peak

# Relative differences of three losses. In bf16 a token near the border between two experts may go to either.
NEAR = {"fp32": 1e-4, "bf16": 1e-2}
MECHANISMS: dict[str, dict[str, Any]] = {
    "mla, experts, MTP": {},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "sliding": {"attention": "sliding", "sliding_window": 16, "global_stride": 4},
    "dsa": {"attention": "dsa", "index_topk": 16},
    "64 experts, 6 chosen": {"q_lora_rank": None, "n_routed_experts": 64, "num_experts_per_tok": 6},
    "experts of width 100": {"moe_intermediate_size": 100},
    "norm dyt": {"norm": "dyt"},
}
# One block of the 16B recipe: it is nearly all of that model's time.
BLOCK_16B = ModelConfig(
    vocab_size=1024, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    max_position_embeddings=4096,
)  # fmt: skip
Step = Callable[[], float]


def engine_step(
    config: ModelConfig,
    device: torch.device,
    rows: int,
    seq_len: int,
    *,
    micro_batch: int | None = None,
    **options: Any,
) -> tuple[Engine, Step]:
    """An engine in one process, and a step on a random batch whose rows hold two documents each."""
    chosen = {"optimizer": OptimizerConfig(lr=1e-3, warmup_steps=0), "precision": "bf16"} | options
    settings = EngineOptions(device=device, micro_batch=micro_batch or rows, **chosen)
    engine = Engine(config, Mesh(MeshSizes()), settings)
    tokens = torch.randint(0, config.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    doc_ids = (torch.arange(seq_len) >= seq_len // 2).long().expand(rows, -1).contiguous()
    ahead = torch.cat([tokens[:, 1:], torch.full((rows, 1), -100)], 1)
    ends = torch.cat([doc_ids[:, 1:] != doc_ids[:, :-1], torch.ones(rows, 1, dtype=torch.bool)], 1)
    batch = Batch(tokens, ahead.masked_fill(ends, -100), doc_ids)
    return engine, lambda: engine.train_step(batch, CrossEntropy(0.3), 1e-3).loss


def parity(device: torch.device) -> Facts:
    """Three steps of every mechanism, optimizer and recomputation on the device and on the CPU."""
    variants: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {name: (keys, {}) for name, keys in MECHANISMS.items()}
    for name in ("muon", "sgd"):
        variants[name] = {}, {"optimizer": OptimizerConfig(name=name, lr=1e-3, warmup_steps=0)}
    for kind in ("selective", "full"):
        variants[f"recomputation {kind}"] = {}, {"activation_checkpointing": kind}
    for name, (keys, options) in variants.items():
        for precision, near in NEAR.items():
            losses = []
            for where in (torch.device("cpu"), device):
                _, step = engine_step(ModelConfig(**keys), where, 4, 64, precision=precision, **options)
                losses.append([step() for _ in range(3)])
            apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
            yield {"case": f"{name}, {precision}", "ok": apart <= near, "apart": apart, "losses": losses[1]}


def stages(device: torch.device) -> Facts:
    """Four steps of every stage's objective (GRPO and distillation among them) on the device and on the CPU."""
    mesh = Mesh(MeshSizes())
    subject = small_subject(Layout())
    for stage in STAGES:
        traces = []
        for where in (torch.device("cpu"), device):
            case = Case(for_stage(subject, stage), Layout(device="cpu" if where.type == "cpu" else "cuda"), stage=stage)
            with tempfile.TemporaryDirectory() as folder:
                write_data(Path(folder, "data"), case.subject)
                traces.append(
                    take_steps(case, mesh, device=where, folder=Path(folder, "stage"), data=Path(folder, "data"))
                )
        apart = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(traces[0].losses, traces[1].losses, strict=True))
        yield {"case": stage, "ok": apart <= NEAR["fp32"], "apart": apart, "losses": traces[1].losses}


def ranks(device: torch.device) -> Facts:
    """A layout in processes of its own, over NCCL (one rank a GPU) or gloo (two), against one process."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 2
    layout = Layout(gpus=gpus, dp=gpus, device="cuda" if device.type == "cuda" else "cpu")
    with Verifier(layout.device, TOLERANCES) as verifier:
        for result in verifier.run([Case(small_subject(layout), layout)]):
            yield {"case": result.case.name(), "ok": not (result.error or result.wrong), "error": result.error,
                   "seconds": result.seconds}  # fmt: skip


def waits(device: torch.device) -> Facts:
    """Where a step makes the CPU wait for the device."""
    if device.type != "cuda":
        yield {"case": "waits for the device", "skipped": "there is no device to wait for"}
        return
    _, step = engine_step(ModelConfig(), device, 4, 64)
    step()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(f"{os.path.relpath(each.filename)}:{each.lineno}" for each in told)
    yield {"case": "waits for the device in a step", "count": len(told), "places": dict(places.most_common(40))}


def block(device: torch.device) -> Facts:
    """One block of the 16B model, forward and backward: dense, with experts, in 8 bits, compiled."""
    full = device.type == "cuda"
    config, seq_len = (BLOCK_16B, 4096) if full else (ModelConfig(), 64)
    for kind in ("dense", "experts", "experts in 8 bits", "experts, compiled"):
        layer = 0 if kind == "dense" else 1
        with torch.device("meta"):
            part = Transformer(config, range(layer, layer + 1))
        part = part.to_empty(device="cpu")
        init_weights(part, config, seed=0)
        if "8 bits" in kind:
            use_fp8(part)
        one = part.layers[str(layer)].to(device)
        doc_ids = (torch.arange(seq_len, device=device) >= seq_len // 2).long()[None]
        known = rotary_table(config).to(device)[document_positions(doc_ids)], document_mask(doc_ids)
        breaks = torch._dynamo.utils.counters["graph_break"]
        breaks.clear()
        run = torch.compile(one, backend="inductor" if full else "aot_eager") if "compiled" in kind else one
        x = torch.randn(1, seq_len, config.hidden_size, device=device, requires_grad=True)

        def both(run: Any = run, x: torch.Tensor = x, known: Any = known) -> None:
            with torch.autocast(x.device.type, torch.bfloat16):
                out = run(x, *known)
            out.backward(torch.ones_like(out))

        try:
            fact = {"case": kind, "ms": milliseconds(both, device), **kernels(both, device), **peak(both, device)}
        except Exception as error:  # noqa: BLE001 - a compiler's error is the finding
            fact = {"case": kind, "ok": False, "refused": f"{type(error).__name__}: {str(error)[:300]}"}
        yield fact | ({"graph_breaks": dict(breaks)} if "compiled" in kind else {})


def steps(device: torch.device) -> Facts:
    """PRETRAIN's step of shipped recipes: time and memory beside what `plan` expects of them on this device."""
    for recipe in ("tiny", "small") if device.type == "cuda" else ("tiny",):
        config = load_config(Path(recipe))
        stage, seq_len, micro = config.pretrain, config.data.seq_len, config.layout.micro_batch
        precision = "bf16" if device.type == "cuda" else "fp32"
        engine, step = engine_step(
            config.model, device, stage.batch_size, seq_len, micro_batch=micro, precision=precision
        )
        used = peak(step, device)
        took = milliseconds(step, device)
        fact = {"case": recipe, "ms": took, "tokens_per_s": stage.batch_size * seq_len / took * 1e3, **used}
        try:
            name = torch.cuda.get_device_name(device).split()[1] if device.type == "cuda" else "cpu"
            config = config.model_copy(update={"pretrain": stage.model_copy(update={"precision": precision})})
            plan = make_plan(config, Layout(gpus=1), "pretrain", find_hardware(name))
            fact |= {"planned_ms": plan.timing.seconds * 1e3, "planned_bytes": max(m.total for m in plan.memory)}
        except UserError as error:
            fact |= {"planned": str(error)}
        yield fact | kernels(step, device)
        if device.type == "cuda":
            yield {"case": f"{recipe}, state of a checkpoint", **peak(engine.state, device)}
            state = {name: value.clone() for name, value in engine.state().items()}
            yield {"case": f"{recipe}, loading it", **peak(lambda e=engine, s=state: e.load_state(s), device)}


def decoding(device: torch.device) -> Facts:
    """Sampled answers of the shipped recipes' models: tokens a second and launches, by rows at once."""
    from model.generate.decode import Decoder, generate

    for recipe in ("tiny", "small") if device.type == "cuda" else ("tiny",):
        config = load_config(Path(recipe)).model
        model = Transformer(config).eval().requires_grad_(False)
        init_weights(model, config, seed=0)
        decoder = Decoder(model.to(device))
        for rows in (1, 64, 256) if device.type == "cuda" else (1, 4):
            prompts, new = [[1, 5, 9, 4, 7, 8 + row % 100] for row in range(rows)], 64 if device.type == "cuda" else 8

            def answer(prompts: Any = prompts, new: int = new, decoder: Any = decoder) -> None:
                generate(decoder, prompts, max_new_tokens=new, eos_ids=set(), temperature=1.0)

            took = milliseconds(answer, device)
            yield {"case": f"{recipe}, {rows} rows", "tokens_per_s": rows * new / took * 1e3, **kernels(answer, device)}

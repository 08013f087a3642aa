"""What one process of the benchmark measures. Competitors of a job share the process and take turns.

A process is started for each job with its number of threads and with the allocator settings that our workers use, so
that the peer has them too.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from model.config import ModelConfig
from model.kernels.operations import product
from scripts.model_bench import competitors
from scripts.model_bench.competitors import SHAPES, make_tokens

PROMPT, NEW = 64, 128
TRIED = 2  # rounds of decoding of all peers, before the two quickest are timed
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}  # relative, over the first steps
CHECKED_STEPS = 3
# Of transformers, the fastest of these is held against ours.
ATTENTIONS, TRAIN_EXPERTS, DECODE_EXPERTS = ("sdpa", "eager"), ("grouped_mm",), ("grouped_mm", "batched_mm", "eager")
VARIANTS: dict[str, dict[str, Any]] = {
    "mla": {},
    "dsa": {"attention": "dsa", "index_n_heads": 4, "index_head_dim": 32, "index_topk": 64},
    "mha": {"attention": "mha", "head_dim": 32},
    "gqa": {"attention": "gqa", "head_dim": 32, "num_key_value_heads": 2},
    "mqa": {"attention": "mqa", "head_dim": 32},
    "sliding": {"attention": "sliding", "head_dim": 32},
    "mla, 256 experts in 8 groups": {
        "n_routed_experts": 256, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 64},
    "mla, softmax top-k with auxiliary loss": {
        "scoring_func": "softmax", "topk_method": "greedy", "aux_loss_alpha": 0.01},
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """kind: train, decode, memory or variants. rows: of a batch; seq_len: of a training row."""

    kind: str
    shape: str
    precision: str
    threads: int
    rows: int
    seq_len: int = 256
    rounds: int = 8
    device: str = "cpu"
    who: str = "ours"  # whose memory

    def name(self) -> str:
        what = f"batch {self.rows}" if self.kind == "decode" else f"{self.rows} x {self.seq_len}"
        return f"{self.kind} {self.shape} {self.precision} {what}, {self.threads} thread{'s' * (self.threads > 1)}"


def run(job: Job) -> dict[str, Any]:
    """Measure in this process."""
    torch.set_num_threads(job.threads)
    return {"train": train, "decode": decode, "memory": memory, "variants": variants}[job.kind](job)


def interleave(turns: dict[str, Callable[[int], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every competitor by round; every other round goes backwards, so that no one is always first."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for index in range(rounds):
        for name in list(turns) if index % 2 == 0 else list(reversed(turns)):
            start = time.perf_counter()
            turns[name](index)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _against_fastest(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Ours beside the fastest of the others: medians, and the ratio within each round."""
    peers = {name: statistics.median(times) for name, times in seconds.items() if name != "ours"}
    best = min(peers, key=lambda name: peers[name])
    ratios = [b / a for a, b in zip(seconds["ours"], seconds[best], strict=True)]
    return {"seconds": seconds, "peer": best, "peers": peers, "median": statistics.median(seconds["ours"]),
            "speed_vs_peer": peers[best] / statistics.median(seconds["ours"]),
            "speed_vs_peer_by_round": statistics.median(ratios)}  # fmt: skip


def train(job: Job) -> dict[str, Any]:
    """Training steps on other tokens each time, after the first losses were found equal."""
    config = SHAPES[job.shape]
    steps = {"ours": competitors.ours_step(config, job.precision, job.rows, job.device)}
    for attention in ATTENTIONS:
        for experts in TRAIN_EXPERTS:
            name = f"transformers {attention} {experts}"
            steps[name] = competitors.their_step(config, job.precision, attention, experts, job.device)

    def batch(index: int) -> Any:
        return make_tokens(config, job.rows, job.seq_len, seed=index)

    losses = {name: [step(batch(index)) for index in range(CHECKED_STEPS)] for name, step in steps.items()}
    for name, found in losses.items():
        worst = max(abs(a - b) / abs(b) for a, b in zip(found, losses["ours"], strict=True))
        if not worst <= LOSS_TOLERANCE[job.precision]:
            raise AssertionError(f"{name}: losses {found} are not ours {losses['ours']}; nothing is timed")
    turns = {name: lambda index, step=step: step(batch(100 + index)) for name, step in steps.items()}
    tokens = job.rows * job.seq_len
    flops = config.flops_per_token(job.seq_len) * tokens
    peak = matmul_rate(torch.float32 if job.precision == "fp32" else torch.bfloat16, job.device)
    found = _against_fastest(interleave(turns, job.rounds, job.device))
    return found | {"losses": losses, "tokens_per_second": tokens / found["median"], "matmul_flops": peak,
                    "mfu": flops / found["median"] / peak}  # fmt: skip


def decode(job: Job) -> dict[str, Any]:
    """Greedy decoding of `NEW` tokens after prompts of `PROMPT`, after the tokens were found equal (in fp32)."""
    config, dtype = SHAPES[job.shape], torch.float32 if job.precision == "fp32" else torch.bfloat16
    decoders = {"ours": competitors.ours_decode(config, dtype, NEW, job.device)}
    for attention in ATTENTIONS:
        for experts in DECODE_EXPERTS:
            name = f"transformers {attention} {experts}"
            decoders[name] = competitors.their_decode(config, dtype, NEW, attention, experts, job.device)
    prompts = make_tokens(config, job.rows, PROMPT, seed=1)
    tokens = {name: decoder(prompts) for name, decoder in decoders.items()}
    same = {name: float((found == tokens["ours"]).float().mean()) for name, found in tokens.items()}
    # Behind the first token that rounding decides otherwise, the rest of a row differs.
    if job.precision == "fp32" and min(same.values()) < 0.98:
        raise AssertionError(f"greedy tokens differ, nothing is timed: share that is ours {same}")
    turns = {name: lambda index, decoder=decoder: decoder(prompts) for name, decoder in decoders.items()}
    # Which of many peers is quickest is found in rounds of their own: in those that count, the luckiest would win.
    tried = {name: min(times) for name, times in interleave(turns, TRIED, job.device).items() if name != "ours"}
    timed = {"ours", *sorted(tried, key=lambda name: tried[name])[:2]}
    found = _against_fastest(
        interleave({name: turn for name, turn in turns.items() if name in timed}, job.rounds, job.device)
    )
    return found | {"tried": tried, "tokens_equal": same, "tokens_per_second": job.rows * NEW / found["median"]}


def memory(job: Job) -> dict[str, Any]:
    """Peak bytes of three training steps, above what the process holds before the model is built."""
    config = SHAPES[job.shape]
    competitors.load_libraries(job.who == "ours")
    gc.collect()
    before = _status("VmRSS")
    if job.who == "ours":
        step = competitors.ours_step(config, job.precision, job.rows, job.device)
    else:
        _, attention, experts = job.who.split()
        step = competitors.their_step(config, job.precision, attention, experts, job.device)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as reset:
        reset.write("5")  # the peak begins anew: building is not training
    for index in range(3):
        step(make_tokens(config, job.rows, job.seq_len, seed=index))
    if job.device == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated()}
    return {"peak_bytes": _status("VmHWM") - before}


def variants(job: Job) -> dict[str, Any]:
    """Training steps of every attention and expert variant of the shape, side by side."""
    base = SHAPES[job.shape]
    configs = {name: replace(base, **changes) for name, changes in VARIANTS.items()}
    steps = {
        name: competitors.ours_step(config, job.precision, job.rows, job.device) for name, config in configs.items()
    }

    def batch(index: int) -> Any:
        return make_tokens(base, job.rows, job.seq_len, seed=index)

    turns = {name: lambda index, step=step: step(batch(index)) for name, step in steps.items()}
    interleave(turns, 2, job.device)  # warm up
    seconds = interleave(turns, job.rounds, job.device)
    return {"variants": {name: _variant(configs[name], times, job) for name, times in seconds.items()}}


def _variant(config: ModelConfig, times: list[float], job: Job) -> dict[str, Any]:
    return {"median": statistics.median(times), "tokens_per_second": job.rows * job.seq_len / statistics.median(times),
            "parameters": config.num_params(), "active_parameters": config.num_params(active=True)}  # fmt: skip


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """This machine's best rate for a product of 2048 x 2048 matrices, in operations per second."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        product(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

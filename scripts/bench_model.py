#!/usr/bin/env python3
"""Training steps and decoding of our DeepSeek-V3 beside transformers', same weights, interleaved; and our variants.

python scripts/bench_model.py                          # everything, half an hour on two cores
python scripts/bench_model.py --only train,memory --shapes tiny
python scripts/bench_model.py --quick                  # does it run?

Nothing is timed before the first losses (or the greedy tokens) of all competitors are equal. Of transformers'
attention and expert implementations the fastest is the peer; its processes get the allocator settings of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ray_pipeline.errors import UserError, did_you_mean  # noqa: E402
from ray_pipeline.launch.launchers import worker_environment  # noqa: E402
from scripts.model_bench import plot  # noqa: E402
from scripts.model_bench.jobs import Job  # noqa: E402
from scripts.parallel_bench.results import provenance  # noqa: E402

KINDS = ("train", "decode", "memory", "variants")
SHAPES = ("tiny", "14m")
PATIENCE = 1800.0  # seconds for one job
PEER = "transformers sdpa grouped_mm"  # whose memory is compared


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--threads", default="1,2", help="numbers of threads of a process")
    parser.add_argument("--rounds", type=int, default=None, help="turns of every competitor; default: 10, quick: 2")
    parser.add_argument("--quick", action="store_true", help="the tiny shape on small batches with one thread")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: scripts/results/HARDWARE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    return parser.parse_args(argv)


def chosen(given: str, known: Sequence[str], option: str) -> list[str]:
    """Names of a comma-separated list.

    Raises:
        UserError: an unknown one.
    """
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--{option} {name}: must be of {', '.join(known)}{did_you_mean(name, known)}")
    return names


def jobs(kinds: Sequence[str], shapes: Sequence[str], threads: Sequence[int], *, rounds: int, quick: bool,
         device: str) -> list[Job]:  # fmt: skip
    """In the order in which they run."""
    out = []
    for shape in shapes:
        rows = 2 if quick else {"tiny": 16, "14m": 8}[shape]
        for precision in ("fp32", "bf16"):
            for count in threads:
                common: dict[str, Any] = {
                    "shape": shape, "precision": precision, "threads": count, "rounds": rounds, "device": device,
                }  # fmt: skip
                if "train" in kinds:
                    out.append(Job("train", rows=rows, **common))
                if "decode" in kinds and precision == "fp32":
                    decode_rounds = max(2, rounds * 2 // 3)
                    sizes = (1,) if quick else (1, 32)
                    out += [Job("decode", rows=size, **common | {"rounds": decode_rounds}) for size in sizes]
            common = {"shape": shape, "precision": precision, "threads": threads[-1], "rows": rows, "device": device}
            if "memory" in kinds:
                out += [Job("memory", who=who, **common) for who in ("ours", PEER)]
        if "variants" in kinds:
            out.append(Job("variants", shape, "fp32", threads[-1], rows, rounds=max(2, rounds // 2), device=device))
    return out


def run_job(job: Job) -> dict[str, Any]:
    """In a process of its own.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote.
    """
    environment = os.environ | worker_environment(1, job.threads, job.device)
    environment |= {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory(prefix="bench_model-") as folder:
        given, result = Path(folder, "job.json"), Path(folder, "result.json")
        given.write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [sys.executable, "-m", "scripts.model_bench.child", str(given), str(result)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{job.name()}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def line(job: Job, found: dict[str, Any]) -> str:
    """A job's result in one line, or several for variants."""
    if job.kind == "memory":
        return f"{job.name():48} {job.who:30} {found['peak_bytes'] / 1e6:8.1f} MB"
    if job.kind == "variants":
        rows = [f"  {name:44} {v['tokens_per_second']:9.0f} tokens/s" for name, v in found["variants"].items()]
        return "\n".join([job.name(), *rows])
    mfu = f"  MFU {found['mfu']:.2f}" if "mfu" in found else ""
    return (f"{job.name():48} {found['tokens_per_second']:9.0f} tokens/s  {found['speed_vs_peer']:.2f}x "
            f"(by round {found['speed_vs_peer_by_round']:.2f}) {found['peer']}{mfu}")  # fmt: skip


def memory_ratios(results: Sequence[tuple[Job, dict[str, Any]]]) -> list[str]:
    """Ours over transformers', of every pair of memory jobs."""
    peaks: dict[tuple[str, str], dict[str, int]] = {}
    for job, found in results:
        if job.kind == "memory":
            peaks.setdefault((job.shape, job.precision), {})[job.who] = found["peak_bytes"]
    return [
        f"memory of a training step, {shape} {precision}: {both['ours'] / both[PEER]:.2f} of transformers'"
        for (shape, precision), both in peaks.items()
        if len(both) == 2
    ]


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kinds = chosen(given.only, KINDS, "only")
        shapes = ["tiny"] if given.quick else chosen(given.shapes, SHAPES, "shapes")
        counts = ["1"] if given.quick else chosen(given.threads, ("1", "2", "4", "8"), "threads")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rounds = given.rounds or (2 if given.quick else 10)
    work = jobs(kinds, shapes, [int(count) for count in counts], rounds=rounds, quick=given.quick, device=device)
    about, results, start = provenance(ROOT, device), [], time.monotonic()
    for index, job in enumerate(work):
        try:
            results.append((job, run_job(job)))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(error, file=sys.stderr)
            return 1
        print(line(*results[-1]), flush=True)
        left = (time.monotonic() - start) / (index + 1) * (len(work) - index - 1)
        print(f"{index + 1} of {len(work)}, about {left / 60:.0f} min left", file=sys.stderr, flush=True)
    for text in memory_ratios(results):
        print(text)
    folder = given.out or ROOT / "scripts" / "results" / about["hardware"]
    folder.mkdir(parents=True, exist_ok=True)
    data = {"benchmark": "bench_model", **about, "jobs": [asdict(job) | found for job, found in results]}
    (folder / "bench_model.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "bench_model.svg").write_text(plot.speeds(data), encoding="utf-8")
    print(folder / "bench_model.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python3
"""The first half hour on a GPU: what is right there, how quick it is, and what `plan` says of it, in one command.

python scripts/gpu_check.py                      # every part, in the order of worth, into scripts/results/DEVICE/
python scripts/gpu_check.py --only parity,waits
python scripts/gpu_check.py --device cpu         # as far as a CPU goes: does it run?

Each part has a process and a time limit of its own, so one that fails or hangs costs the others nothing, and what it
found before is kept. Needs torch and pydantic; the whole chain at the end needs Ray and DeepSpeed as well.
Exit code 1 where something computes other numbers than the CPU, or fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ray_pipeline.errors import did_you_mean  # noqa: E402
from ray_pipeline.records.artifacts import write_text  # noqa: E402
from scripts.parallel_bench.results import provenance  # noqa: E402

# Seconds each part may take: half an hour in all. The last is the product's own smoke test, through Ray.
LIMITS = {
    "environment": 90, "parity": 240, "stages": 120, "attention": 240, "experts": 120, "waits": 60, "block": 300,
    "steps": 180, "decoding": 120, "ranks": 120, "chain": 300,
}  # fmt: skip


def run_part(part: str, device: str) -> dict[str, Any]:
    """What a part found, and why it ended early where it did."""
    if part == "chain" and (missing := [name for name in ("ray", "deepspeed") if not importlib.util.find_spec(name)]):
        return {"facts": [], "seconds": 0.0, "skipped": f"{' and '.join(missing)} not installed"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        facts = Path(folder, "facts.jsonl")
        facts.touch()
        own = ["-m", "scripts.gpu_parts.child", part, device, str(facts)]
        command = [sys.executable, *(["-m", "ray_pipeline.cli", "test"] if part == "chain" else own)]
        ended: dict[str, Any] = {}
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMITS[part], check=False)
            if done.returncode:
                ended["failed"] = (done.stderr.strip() or done.stdout.strip())[-2000:]
        except subprocess.TimeoutExpired:
            ended["failed"] = f"not done after {LIMITS[part]} s"
        found = [json.loads(line) for line in facts.read_text(encoding="utf-8").splitlines()]
    return {"facts": found, "seconds": time.monotonic() - start, **ended}


def verdict(found: dict[str, Any]) -> str:
    """One word, and what it is about."""
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    wrong = [fact["case"] for fact in found["facts"] if fact.get("ok") is False]
    if "failed" in found:
        return f"FAILED: {found['failed'].splitlines()[-1][:150]}"
    return f"DIFFERS: {'; '.join(wrong)[:150]}" if wrong else "ok"


def line(fact: dict[str, Any]) -> str:
    """A fact as a line to read: short figures alone."""
    shown = {
        key: value for key, value in fact.items() if key not in ("case", "ok") and not isinstance(value, dict | list)
    }
    figures = "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
    return f"  {fact['case']}: {figures}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(LIMITS), help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: scripts/results/DEVICE")
    given = parser.parse_args(argv)
    parts = [name.strip() for name in given.only.split(",")]
    for name in parts:
        if name not in LIMITS:
            print(f"--only {name}: must be of {', '.join(LIMITS)}{did_you_mean(name, LIMITS)}", file=sys.stderr)
            return 2
    about = provenance(ROOT, given.device)
    folder = given.out or ROOT / "scripts" / "results" / about["hardware"]
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for number, part in enumerate(parts, start=1):
        print(f"[{number}/{len(parts)}] {part}, at most {LIMITS[part]} s", flush=True)
        results[part] = run_part(part, given.device)
        for fact in results[part]["facts"]:
            print(line(fact))
        print(f"  {verdict(results[part])} ({results[part]['seconds']:.0f} s)", flush=True)
        # After every part: whatever ends this, what was measured is there.
        text = json.dumps({"benchmark": "gpu_check", **about, "parts": results}, indent=1)
        write_text(folder / "gpu_check.json", text + "\n")
    print(folder / "gpu_check.json")
    return int(any(verdict(found).startswith(("FAILED", "DIFFERS")) for found in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())

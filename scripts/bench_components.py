#!/usr/bin/env python3
"""Forward and backward of single components: ours, the paper's plain formula, and the library people would use.

python scripts/bench_components.py                       # all eight, some minutes on two cores
python scripts/bench_components.py --only MLA,"DPO loss"
python scripts/bench_components.py --quick               # does it run?

MQA, GQA, MLA, a standard mixture of experts and DeepSeekMoE, and the losses of GRPO, DPO and distillation, in fp32 at
batch 4, 64 tokens, width 512. Nothing is timed before the outputs and all gradients of a component's forms are equal.
Forms take turns in one process, with the allocator settings of our workers; "ours is" compares CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ray_pipeline.errors import UserError  # noqa: E402
from ray_pipeline.launch.launchers import worker_environment  # noqa: E402
from scripts.bench_model import chosen  # noqa: E402
from scripts.component_bench import plot  # noqa: E402
from scripts.component_bench.child import COMPONENTS  # noqa: E402
from scripts.component_bench.form import BATCH, TOKENS, WIDTH  # noqa: E402
from scripts.parallel_bench.results import provenance  # noqa: E402


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(COMPONENTS), help=f"of {', '.join(COMPONENTS)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=None, help="turns of every form; default: 20, quick: 2")
    parser.add_argument("--quick", action="store_true", help="two rounds of each")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: scripts/results/HARDWARE")
    return parser.parse_args(argv)


def measured(names: Sequence[str], threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Each component's entry as it is ready, all from one process.

    Raises:
        RuntimeError: it failed, because two forms differ perhaps; the message ends with what it wrote.
    """
    environment = os.environ | worker_environment(1, threads, "cpu") | {"TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "scripts.component_bench.child", str(threads), str(rounds), *names]
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield json.loads(line)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"exit code {process.returncode}\n{said.read()[-3000:]}")


def lines(entry: dict[str, Any]) -> list[str]:
    """A component's rows of the table."""
    out = []
    for form, times in entry["cpu_milliseconds"].items():
        wall = entry["wall_milliseconds"][form]["median"]
        text = (
            f"{entry['name']:14} {form:30} {times['median']:8.2f} {times['p10']:8.2f} {times['p90']:8.2f} {wall:8.2f}"
        )
        if form != "ours":
            speed, worst = entry["speed_by_round"][form], max(entry["differences"][form].values())
            text += f"  {speed['median']:5.2f}x ({speed['p10']:.2f}-{speed['p90']:.2f})  {worst:.0e}"
        out.append(text)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    try:
        names = chosen(given.only, list(COMPONENTS), "only")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rounds = given.rounds or (2 if given.quick else 20)
    about, entries = provenance(ROOT, "cpu"), []
    print(
        f"{'component':14} {'form':30} {'CPU ms':>8} {'p10':>8} {'p90':>8} {'wall ms':>8}  ours is, by round  differs"
    )
    try:
        for entry in measured(names, given.threads, rounds):
            entries.append(entry)
            print("\n".join(lines(entry)), flush=True)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    folder = given.out or ROOT / "scripts" / "results" / about["hardware"]
    folder.mkdir(parents=True, exist_ok=True)
    data = {"benchmark": "bench_components", **about, "threads": given.threads, "rounds": rounds,
            "batch": BATCH, "tokens": TOKENS, "width": WIDTH, "components": entries}  # fmt: skip
    (folder / "bench_components.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "bench_components.svg").write_text(plot.times(data), encoding="utf-8")
    print(folder / "bench_components.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

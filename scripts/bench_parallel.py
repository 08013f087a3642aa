#!/usr/bin/env python3
"""Tokens per second of every kind of parallelism, beside torch's own for the same model, in one interleaved run.

python scripts/bench_parallel.py                     # everything
python scripts/bench_parallel.py --quick             # a small model, two rows: does it run?
python scripts/bench_parallel.py --rows ddp,zero2    # these, and what they are held against

Nothing is timed before every competitor's first losses and gradient norms equal those of one plain process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from model.convert.hf_config import to_hf  # noqa: E402
from ray_pipeline.errors import UserError, did_you_mean  # noqa: E402
from ray_pipeline.launch.launchers import worker_environment  # noqa: E402
from scripts.parallel_bench import plot, results  # noqa: E402
from scripts.parallel_bench.processes import CompetitorFailed, World  # noqa: E402
from scripts.parallel_bench.task import REFERENCE, Row, Task, full_task, quick_task, table  # noqa: E402

CHECKED_STEPS = 3  # the second and third loss depend on the first two updates
QUICK_ROWS = "ddp,pp3 1f1b"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"a small model and few steps; rows {QUICK_ROWS}")
    parser.add_argument("--rows", default=None, help="names from the table, comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=None, help="turns of every row; default: 12, quick: 2")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps of every row before the first timed one")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: scripts/results/HARDWARE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    return parser.parse_args(argv)


def choose_rows(names: str | None, *, devices: int | None, deepspeed: bool) -> tuple[list[Row], list[str]]:
    """Rows to run, in the table's order with their peers and the reference, and notices about those left out.

    Args:
        devices: number of GPUs, which each hold one rank; None on CPU.
        deepspeed: whether it is installed.
    Raises:
        UserError: an unknown row.
    """
    known = {row.name: row for row in table()}
    wanted = list(known) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(f"--rows {name}: no such row{did_you_mean(name, known)}. Rows: {', '.join(known)}")
    notices, kept = [], {REFERENCE.name}
    for name in wanted:
        row = known[name]
        if devices is not None and row.ranks > devices:
            notices.append(f"{name} skipped: it needs {row.ranks} GPUs, there are {devices}")
        elif row.needs_deepspeed and not deepspeed:
            notices.append(f"{name} skipped: deepspeed is not installed")
        else:
            kept |= {name} | ({row.peer} if row.peer else set())
    return [row for row in known.values() if row.name in kept], notices


def check(worlds: dict[int, World], rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Differences of every competitor's first losses and norms from the reference's.

    Raises:
        CompetitorFailed: one of them computes something else; timing it would mean nothing.
    """
    assert rows[0] == REFERENCE
    out, reference = {}, worlds[REFERENCE.ranks].losses(REFERENCE.name, CHECKED_STEPS)
    for row in rows[1:]:
        found = worlds[row.ranks].losses(row.name, CHECKED_STEPS)
        out[row.name] = results.differences(reference, found)
        if not results.equal_enough(out[row.name]):
            raise CompetitorFailed(
                f"{row.name} does not compute what one process does, so nothing is timed: (loss, norm) of the first "
                f"steps {found}, expected {reference}, largest relative differences {out[row.name]}"
            )
    return {REFERENCE.name: (0.0, 0.0)} | out


def measure(
    worlds: dict[int, World], rows: Sequence[Row], *, rounds: int, steps: int, warmup: int
) -> dict[str, results.Rounds]:
    """Turns of `steps` steps each. Every other round goes backwards through the rows: no one is always first."""
    position = CHECKED_STEPS
    for row in rows:
        worlds[row.ranks].timed(row.name, position, warmup)
    position += warmup + 1
    out: dict[str, results.Rounds] = {row.name: [] for row in rows}
    for index in range(rounds):
        for row in rows if index % 2 == 0 else reversed(rows):
            out[row.name].append(worlds[row.ranks].timed(row.name, position, steps))
        position += steps + 1
        _say(f"round {index + 1} of {rounds}")
    return out


def peak_memory(task: Task, row: Row, device_type: str) -> list[dict[str, int]]:
    """Of a few steps in processes with this row alone."""
    with World(task, row.ranks, device_type) as world:
        world.build(row)
        world.timed(row.name, 0, CHECKED_STEPS - 1)
        return world.memory()


def run(task: Task, rows: Sequence[Row], device_type: str, *, rounds: int, steps: int, warmup: int) -> dict[str, Any]:
    """The whole comparison, as it is written to the JSON file."""
    about = results.provenance(ROOT, device_type)
    with ExitStack() as stack:
        sizes = sorted({row.ranks for row in rows})
        worlds = {ranks: stack.enter_context(World(task, ranks, device_type)) for ranks in sizes}
        for row in rows:
            worlds[row.ranks].build(row)
        difference = check(worlds, rows)
        _say(f"first {CHECKED_STEPS} losses and gradient norms of {len(rows)} rows are equal")
        timed = measure(worlds, rows, rounds=rounds, steps=steps, warmup=warmup)
    memory = {row.name: peak_memory(task, row, device_type) for row in rows}
    model = task.model
    return {
        "benchmark": "bench_parallel",
        **about,
        "task": {
            "parameters": model.num_params(),
            "active_parameters": model.num_params(active=True),
            "rows": task.rows,
            "seq_len": task.seq_len,
            "precision": "fp32",
            "optimizer": "AdamW, fused, clipped by the global norm",
            "model": to_hf(model),
        },
        "rounds": rounds,
        "steps_per_round": steps,
        "rows": results.summarise(task, rows, timed, memory, difference),
    }


def write(found: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """bench_parallel.json and .svg."""
    folder.mkdir(parents=True, exist_ok=True)
    data, picture = folder / "bench_parallel.json", folder / "bench_parallel.svg"
    data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    millions = found["task"]["parameters"] / 1e6
    caption = (
        f"{millions:.1f}M parameters, {found['task']['rows']} x {found['task']['seq_len']} tokens a step, fp32, "
        f"{found['hardware']}, torch {found['versions']['torch']}, deepspeed {found['versions']['deepspeed']}, "
        f"commit {found['commit'][:7]}{' with changes' if found['uncommitted_changes'] else ''}"
    )
    picture.write_text(plot.bars(found["rows"], caption), encoding="utf-8")
    return data, picture


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    device_type = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    devices = torch.cuda.device_count() if device_type == "cuda" else None
    try:
        names = given.rows or (QUICK_ROWS if given.quick else None)
        deepspeed = importlib.util.find_spec("deepspeed") is not None
        rows, notices = choose_rows(names, devices=devices, deepspeed=deepspeed)
    except UserError as error:
        _say(str(error))
        return 2
    for notice in notices:
        _say(notice)
    # The server from which every process is forked inherits these; it imports torch once for all.
    os.environ |= worker_environment(1, 1, device_type)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["scripts.parallel_bench.preload"])
    task = quick_task() if given.quick else full_task()
    rounds = given.rounds or (2 if given.quick else 12)
    try:
        found = run(task, rows, device_type, rounds=rounds, steps=given.steps, warmup=given.warmup)
    except CompetitorFailed as error:
        _say(str(error))
        return 1
    for line in results.lines(found["rows"]):
        print(line)
    for path in write(found, given.out or ROOT / "scripts" / "results" / found["hardware"]):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

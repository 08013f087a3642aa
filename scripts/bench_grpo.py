#!/usr/bin/env python3
"""Seconds of a GRPO step, split into rollouts, scoring and update, beside TRL's GRPOTrainer, interleaved.

python scripts/bench_grpo.py                     # fp32 and bf16, ten minutes on two cores
python scripts/bench_grpo.py --precision fp32 --rounds 3
python scripts/bench_grpo.py --quick             # does it run?

Both train the default recipe's model from the same weights on the same prompts, with the same group size, limit of
tokens, rewards, KL and optimizer. Nothing is timed before ours gives TRL's loss and gradient norm on TRL's own first
batch. The peer is the fastest of transformers' attention and expert implementations.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ray_pipeline.errors import UserError, did_you_mean  # noqa: E402
from ray_pipeline.launch.launchers import worker_environment  # noqa: E402
from scripts.grpo_bench import plot  # noqa: E402
from scripts.grpo_bench.task import Task, prepare  # noqa: E402
from scripts.parallel_bench.results import provenance  # noqa: E402

PRECISIONS = ("fp32", "bf16")
PEERS = (("sdpa", "grouped_mm"), ("eager", "grouped_mm"))  # batched_mm takes eight times as long
PARTS = ("seconds", "rollouts", "scoring", "update", "tokens")
WARM_UP = 2  # steps before the first timed one
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-3  # in fp32; the loss is near zero, so its difference is absolute
BF16_TOLERANCE = 5e-2


class Competitor:
    """A child process that takes a step when asked."""

    def __init__(self, who: str, task: Task, folder: Path, **more: str):
        job = folder / f"{who.replace(' ', '-')}.json"
        job.write_text(json.dumps({"who": who, "task": asdict(task), "folder": str(folder), **more}))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        environment = os.environ | worker_environment(1, task.threads, device)
        environment |= {"OMP_NUM_THREADS": str(task.threads), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        environment |= {"TRANSFORMERS_VERBOSITY": "error"}
        self.who, self.errors = who, (folder / f"{who}.err").open("w+")
        command = [sys.executable, "-m", "scripts.grpo_bench.child", str(job)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def step(self) -> dict[str, float]:
        """Take one step.

        Raises:
            RuntimeError: the child ended; the message ends with what it wrote.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.who} ended:\n{self.errors.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


def measure(task: Task, rounds: int, peers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Medians of `rounds` interleaved steps of every competitor, after the check that both compute the same.

    Raises:
        RuntimeError: a competitor failed, or ours differs from TRL.
    """
    with tempfile.TemporaryDirectory(prefix="bench_grpo-") as name:
        folder = Path(name)
        prepare(folder, task, WARM_UP + rounds)
        theirs = [
            Competitor(f"TRL {attention} {experts}", task, folder, attention=attention, experts=experts)
            for attention, experts in peers
        ]
        competitors = list(theirs)
        try:
            steps: dict[str, list[dict[str, float]]] = {peer.who: [peer.step()] for peer in theirs}
            ours = Competitor("ours", task, folder)
            competitors.append(ours)
            difference = ours.step()  # the first answer is the comparison on TRL's batch
            _refuse_difference(task, difference)
            steps["ours"] = []
            for round_ in range(WARM_UP + rounds):
                for competitor in competitors if round_ % 2 else competitors[::-1]:
                    if competitor is ours or round_:  # the peers took their first step above
                        steps[competitor.who].append(competitor.step())
                latest = "  ".join(f"{who}: {taken[-1]['seconds']:.2f} s" for who, taken in steps.items())
                print(f"  round {round_ + 1}/{WARM_UP + rounds}  {latest}", flush=True)
        finally:
            for competitor in competitors:
                competitor.close()
    return summary(task, {who: taken[WARM_UP:] for who, taken in steps.items()}, difference)


def _refuse_difference(task: Task, difference: dict[str, float]) -> None:
    fp32 = task.precision == "fp32"
    bounds = {"loss": LOSS_TOLERANCE if fp32 else BF16_TOLERANCE, "norm": NORM_TOLERANCE if fp32 else BF16_TOLERANCE}
    for name, bound in bounds.items():
        if not difference[name] <= bound:
            raise RuntimeError(f"ours and TRL differ on the same batch: {name} by {difference[name]:.2e}, over {bound}")


def summary(task: Task, steps: dict[str, list[dict[str, float]]], difference: dict[str, float]) -> dict[str, Any]:
    """Medians by competitor, and ours against the fastest peer."""
    medians = {
        who: {part: statistics.median(step[part] for step in taken) for part in PARTS} for who, taken in steps.items()
    }
    peer = min((who for who in medians if who != "ours"), key=lambda who: medians[who]["seconds"])
    by_round = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(steps["ours"], steps[peer], strict=True)]
    return {
        "task": asdict(task), "medians": medians, "peer": peer, "difference": difference,
        "speed_vs_peer": medians[peer]["seconds"] / medians["ours"]["seconds"],
        "speed_vs_peer_by_round": statistics.median(by_round), "steps": steps,
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """A table row for every competitor."""
    out = []
    for who, part in found["medians"].items():
        ratio = f"  {found['speed_vs_peer']:.2f}x (by round {found['speed_vs_peer_by_round']:.2f})"
        out.append(
            f"{found['task']['precision']} {who:22} {part['seconds']:7.2f} s/step: rollouts {part['rollouts']:.2f}, "
            f"scoring {part['scoring']:.2f}, update {part['update']:.2f}; {part['tokens']:.1f} tokens/answer"
            + (ratio if who == "ours" else "")
        )
    return out


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--precision", default=",".join(PRECISIONS), help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--rounds", type=int, default=None, help="timed steps of each; default: 7, quick: 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="few prompts, one peer, fp32")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: scripts/results/HARDWARE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    task = Task(threads=given.threads)
    precisions, peers, rounds = given.precision.split(","), PEERS, given.rounds or 7
    if given.quick:
        task = replace(task, prompts=4, group_size=4, max_new_tokens=16)
        precisions, peers, rounds = ["fp32"], PEERS[:1], given.rounds or 1
    for precision in precisions:
        if precision not in PRECISIONS:
            hint = did_you_mean(precision, PRECISIONS)
            raise UserError(f"--precision {precision}: must be of {', '.join(PRECISIONS)}{hint}")
    results = []
    for precision in precisions:
        print(f"{precision}, {task.threads} thread(s): {task.prompts} prompts x {task.group_size} answers", flush=True)
        results.append(measure(replace(task, precision=precision), rounds, peers))
        print("\n".join(lines(results[-1])), flush=True)
    where = provenance(ROOT, "cuda" if torch.cuda.is_available() else "cpu")
    out = given.out or ROOT / "scripts" / "results" / where["hardware"]
    out.mkdir(parents=True, exist_ok=True)
    data = {"benchmark": "bench_grpo", **where, "results": results}
    (out / "bench_grpo.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (out / "bench_grpo.svg").write_text(plot.steps(data), encoding="utf-8")
    print(f"Results: {out / 'bench_grpo.json'}, {out / 'bench_grpo.svg'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"Error: {error}")

"""One competitor in a process of its own: a line on stdin asks for a step, a line of JSON on stdout is its seconds.

python -m scripts.grpo_bench.child JOB.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from scripts.grpo_bench.task import Task


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    task, folder = Task(**job["task"]), Path(job["folder"])
    torch.set_num_threads(task.threads)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer

    def wait() -> None:
        if not sys.stdin.readline():
            os._exit(0)  # the bench is over; the trainer's loop would go on

    def report(figures: dict[str, float]) -> None:
        print(json.dumps(figures), file=answers, flush=True)

    if job["who"] == "ours":
        from scripts.grpo_bench import ours

        ours.run(task, folder, wait, report)
    else:
        from scripts.grpo_bench import trl_peer

        trl_peer.run(task, folder, job["attention"], job["experts"], wait, report)


if __name__ == "__main__":
    main(sys.argv[1])

"""A driver in a process of its own, to be killed: `python -m tests.dag.driver FOLDER RANKS run|resume`."""

from __future__ import annotations

import sys
from pathlib import Path

from ray_pipeline.cli.group import guarded
from ray_pipeline.cli.run import can_resume
from ray_pipeline.dag.request import RunRequest, StageSelection
from ray_pipeline.dag.workflow import execute
from tests.dag import toy_stages as toy


def main(folder: Path, ranks: int, verb: str) -> int:
    """Run or resume the toy run up to the stage with ranks."""
    settings, until = toy.config(folder), StageSelection(until="pretrain")
    return execute(RunRequest(settings, toy.layout(ranks), until, resume=verb == "resume", stage_functions=toy.RANKED))


def command_line(folder: Path, ranks: int, verb: str) -> int:
    """`main` with signals taken as the command line takes them."""
    with can_resume(toy.config(folder)):
        return main(folder, ranks, verb)


if __name__ == "__main__":
    sys.exit(guarded(lambda: command_line(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))

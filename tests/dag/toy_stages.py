"""Stages small enough to test the workflow with: they count, and write down that they ran."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.layout.layout import Layout
from ray_pipeline.records.artifacts import write_json
from ray_pipeline.records.progress import Progress
from ray_pipeline.settings.chain import chain
from ray_pipeline.settings.schema import STAGES, PipelineFields

STEPS = 8
CHAIN = chain(PipelineFields())  # DPO is asked for by name


def layout(ranks: int = 1) -> Layout:
    """CPU ranks in a pipeline."""
    return Layout(gpus=ranks, pp=ranks)


def config(folder: Path, **values: Any) -> PipelineFields:
    """Settings of a toy run in `folder`; dotted keys change one setting each: grpo__beta=0.02."""
    settings: dict[str, Any] = {"output_dir": folder, "run_name": "toy", "tracking": {"wandb": False}}
    for key, value in values.items():
        section, _, name = key.partition("__")
        if name:
            settings.setdefault(section, {})[name] = value
        else:
            settings[section] = value
    return PipelineFields(**settings)


def note(context: StageContext, stage: str) -> StageResult:
    """Append the stage to calls.log, read the inputs' results, write one of our own."""
    with (context.run_dir / "calls.log").open("a") as file:
        file.write(f"{stage}\n")
    total = 1 + sum(json.loads((r.folder / "out.json").read_text()) for r in context.inputs.values())
    write_json(context.folder / "out.json", total)
    learned = None if stage in ("data_prep", "export") else True
    return StageResult(context.folder, {"accuracy": 0.5}, {"input_accuracy": 0.25}, learned)


def calls(run_dir: Path) -> list[str]:
    """Stages that ran, in order, since the last look."""
    path = run_dir / "calls.log"
    if not path.exists():
        return []
    names = path.read_text().split()
    path.unlink()
    return names


class Note:
    """`note` for one stage, picklable."""

    def __init__(self, stage: str):
        self.stage = stage

    def __call__(self, context: StageContext) -> StageResult:
        return note(context, self.stage)


FUNCTIONS: dict[str, Callable[[StageContext], StageResult]] = {stage: Note(stage) for stage in STAGES}


def user_mistake(context: StageContext) -> StageResult:
    raise UserError("input.txt line 3: no field text. Add it.")


def bug(context: StageContext) -> StageResult:
    print("what a library says")
    raise ZeroDivisionError("a bug in a stage")


def refuses(context: StageContext) -> StageResult:
    """As EXPORT where one kind of file was too coarse."""
    return StageResult(context.folder, {"checks_passed": 2.0, "model-q2_k.gguf/refused": 1.0})


def learns_nothing(context: StageContext) -> StageResult:
    write_json(context.folder / "out.json", 1)
    return StageResult(context.folder, {"accuracy": 0.25}, {"input_accuracy": 0.25}, False)


def count_on_ranks(context: StageContext) -> StageResult:
    """Train on ranks; the metric tells whether every step was taken exactly once, in order."""
    value = context.launcher.run("pretrain", count, {"folder": str(context.folder), "faults": str(context.run_dir)})
    write_json(context.folder / "out.json", 1)
    return StageResult(context.folder, value, {"ln_vocab": 6.0, "unigram_entropy": 5.0}, True)


def count(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: STEPS steps, a checkpoint after each second one. Faults are switched on by files."""
    import torch
    import torch.distributed as dist

    folder, faults, rank = Path(arguments["folder"]), Path(arguments["faults"]), dist.get_rank()
    found = sorted((folder / "checkpoints").glob("step_*"))
    start, value = json.loads((found[-1] / "state.json").read_text()) if found else (0, 7)
    progress = Progress(folder, "pretrain", STEPS) if rank == 0 else None
    print(f"rank {rank} begins at step {start}")
    for step in range(start, STEPS):
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        value = (value * 31 + step + int(total)) % 1_000_003
        if rank == 0 and (step + 1) % 2 == 0:
            write_json(folder / "checkpoints" / f"step_{step + 1:08d}" / "state.json", [step + 1, value])
        if progress is not None:
            progress.update(step + 1, loss=1.0)
        _fault(faults, folder, rank, step)
    return {"validation_loss": value / 1_000_003, "started_at": float(start)}


def _fault(faults: Path, folder: Path, rank: int, step: int) -> None:
    if (faults / "slow").exists() and step == 4:
        (faults / f"rank-{rank}-waits").touch()
        time.sleep(60)  # longer than workers outlive their driver, on a busy machine too
    if (faults / "user-error").exists() and rank == 0 and step == 1:
        with (folder / "attempts.log").open("a") as file:
            file.write("x")
        raise UserError("loss nan at step 2: training diverged. Lower the rate.")
    killer = faults / "kill-rank-0"
    if killer.exists() and rank == 0 and step == 4:
        killer.unlink()
        os.kill(os.getpid(), 9)


RANKED = {**FUNCTIONS, "pretrain": count_on_ranks}

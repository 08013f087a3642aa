"""`inspect-batch`: look at what a training step reads, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.runs import CONFIG_FILE, find_run, output_dir
from ray_pipeline.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

# What each stage trains on: packed rows, or questions.
ROWS = {"pretrain": "pretrain", "sft": "sft", "distillation": "sft"}
STAGES_WITH_DATA = (*ROWS, "grpo")


@click.command("inspect-batch")
@click.argument("run")
@click.option("--stage", required=True, help="pretrain, sft, grpo or distillation.")
@click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="The training step, from 0.")
@click.option("--rows", type=click.IntRange(1), default=2, show_default=True, help="Rows of it to print.")
@click.option("--validation", is_flag=True, help="The held-out rows instead.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def inspect_batch(run: str, stage: str, step: int, rows: int, validation: bool, **options: str | None) -> int:
    """Print the rows that a step of RUN reads: supervised tokens in colour, document boundaries marked."""
    from ray_pipeline.cli.stage_folders import choose_stage
    from ray_pipeline.errors import did_you_mean

    if stage not in STAGES_WITH_DATA:
        hint = did_you_mean(stage, STAGES_WITH_DATA)
        raise UserError(f"--stage {stage}: reads no batches{hint}. Use one of {', '.join(STAGES_WITH_DATA)}.")
    run_dir = find_run(run, output_dir(options["output_dir"]))
    _, data = choose_stage(run_dir, "data_prep", ("data_prep",))
    if stage == "grpo":
        show_prompts(data / "prompts" / ("heldout.jsonl" if validation else "train.jsonl"), rows)
    else:
        show_rows(run_dir, data, stage, step, rows, validation)
    return 0


def show_prompts(path: Path, count: int) -> None:
    """Print questions with their answers."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines[:count]:
        prompt = json.loads(line)
        console.print(f"{prompt['prompt']}", style="bold", markup=False, highlight=False)
        about = f"  answer {prompt['answer']}, {prompt['category']}, difficulty {prompt['difficulty']}"
        console.print(about, markup=False)
    console.print(f"{min(count, len(lines))} of {len(lines)} questions in {path}", style="dim", highlight=False)


def show_rows(run_dir: Path, data: Path, stage: str, step: int, rows: int, validation: bool) -> None:
    """Print packed rows."""
    from rich.console import Console

    from ray_pipeline.config_load import load_config
    from ray_pipeline.data.inspect import render_rows
    from ray_pipeline.data.loader import PackedRows
    from ray_pipeline.data.tokenizer import load_tokenizer

    config = load_config(run_dir / CONFIG_FILE)
    packed = PackedRows(data / ROWS[stage] / ("validation" if validation else "train"))
    if validation:
        batch = packed.slice(0, min(rows, len(packed)))
    else:
        batch = packed.batch(config.seed, step, getattr(config, stage).batch_size).rows(0, rows)
    console = Console(soft_wrap=True)
    for text in render_rows(batch, load_tokenizer(data / "tokenizer")):
        console.print(text if console.is_terminal else with_marks(text))
    console.print(LEGEND, highlight=False, markup=True)


LEGEND = "[bold green]trained on[/] (« » without colour), [dim]read only[/], [bold magenta]│[/] a new document begins"


def with_marks(text: Text) -> Text:
    """The same row readable without colour: what is trained on stands in « »."""
    from rich.text import Text

    from ray_pipeline.data.inspect import SUPERVISED

    out, end = Text(), 0
    for span in text.spans:
        if span.style == SUPERVISED:
            out.append(f"{text.plain[end : span.start]}«{text.plain[span.start : span.end]}»")
            end = span.end
    return out.append(text.plain[end:])

"""`inspect-batch`: look at what a training step reads, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.runs import find_run, output_dir
from ray_pipeline.errors import UserError
from ray_pipeline.settings.run_folder import CONFIG_FILE, HELDOUT_QUESTIONS, TOKENIZER, TRAIN_QUESTIONS

if TYPE_CHECKING:
    from rich.text import Text

# What each stage trains on: packed rows, pairs of answers, or questions.
FOLDERS = {"pretrain": "pretrain", "sft": "sft", "dpo": "preferences", "distillation": "sft", "grpo": "prompts"}
# Of a reference answer that is a whole puzzle.
ANSWER_CHARACTERS = 100


@click.command("inspect-batch")
@click.argument("run")
@click.option("--stage", required=True, help="pretrain, sft, dpo, grpo or distillation.")
@click.option("--step", type=click.IntRange(0, 10**8), default=0, show_default=True, help="The training step, from 0.")
@click.option(
    "--rows", type=click.IntRange(1, 10**7), default=2, show_default=True, help="Rows, or pairs, of it to print."
)
@click.option("--validation", is_flag=True, help="The held-out rows instead.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def inspect_batch(run: str, stage: str, step: int, rows: int, validation: bool, **options: str | None) -> int:
    """Print the rows that a step of RUN reads: supervised tokens in colour, document boundaries marked."""
    from ray_pipeline.cli.runs import choose_stage
    from ray_pipeline.errors import did_you_mean

    if stage not in FOLDERS:
        hint = did_you_mean(stage, FOLDERS)
        raise UserError(f"--stage {stage}: reads no batches{hint}. Use one of {', '.join(FOLDERS)}.")
    run_dir = find_run(run, output_dir(options["output_dir"]))
    _, data = choose_stage(run_dir, "data_prep", ("data_prep",))
    if stage == "grpo":
        show_prompts(data / (HELDOUT_QUESTIONS if validation else TRAIN_QUESTIONS), rows)
    else:
        show_rows(run_dir, data, stage, step, rows, validation)
    return 0


def show_prompts(path: Path, count: int) -> None:
    """Print questions with their answers."""
    from rich.console import Console

    from ray_pipeline.data.tasks.question import prepared_questions

    console = Console(soft_wrap=True)
    questions = prepared_questions(path)
    for prompt in questions[:count]:
        console.print(f"{prompt['prompt']}", style="bold", markup=False, highlight=False)
        answer = str(prompt["answer"])
        answer = answer if len(answer) <= ANSWER_CHARACTERS else f"{answer[:ANSWER_CHARACTERS]}..."
        console.print(f"  answer {answer}, {prompt['category']}, difficulty {prompt['difficulty']}", markup=False)
    console.print(f"{min(count, len(questions))} of {len(questions)} questions in {path}", style="dim", highlight=False)


def show_rows(run_dir: Path, data: Path, stage: str, step: int, rows: int, validation: bool) -> None:
    """Print packed rows, or pairs."""
    from rich.console import Console

    from ray_pipeline.data.chat.tokenizer import load_tokenizer
    from ray_pipeline.data.rows.inspect import render_pairs, render_rows
    from ray_pipeline.data.rows.loader import PackedRows, row_order
    from ray_pipeline.data.rows.preferences import PairRows
    from ray_pipeline.settings.loading import load_config

    config = load_config(run_dir / CONFIG_FILE)
    folder = data / FOLDERS[stage] / ("validation" if validation else "train")
    if stage == "dpo" and not folder.is_dir():
        raise UserError(
            "--stage dpo: the run prepared no preferences, as dpo is not among its stages. Add it with --dpo."
        )
    stored = PairRows(folder) if stage == "dpo" else PackedRows(folder)
    size = len(stored) if validation else getattr(config, stage).batch_size
    indices = list(range(size)) if validation else row_order(len(stored), config.seed, step, size)
    render = render_pairs if stage == "dpo" else render_rows
    console = Console(soft_wrap=True)
    for text in render(stored.take(indices[:rows]), load_tokenizer(data / TOKENIZER)):
        console.print(text if console.is_terminal else with_marks(text))
    console.print(LEGEND, highlight=False, markup=True)


LEGEND = "[bold green]trained on[/] (« » without colour), [dim]read only[/], [bold magenta]│[/] a new document begins"


def with_marks(text: Text) -> Text:
    """The same row readable without colour: what is trained on stands in « »."""
    from rich.text import Text

    from ray_pipeline.data.rows.inspect import REJECTED, SUPERVISED

    out, end = Text(), 0
    for span in text.spans:
        if span.style in (SUPERVISED, REJECTED):
            out.append(f"{text.plain[end : span.start]}«{text.plain[span.start : span.end]}»")
            end = span.end
    return out.append(text.plain[end:])

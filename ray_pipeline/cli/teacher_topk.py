"""`teacher-topk`: a teacher's likeliest tokens for a run's conversations, once, for students that never see it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.runs import find_run, output_dir
from ray_pipeline.errors import UserError
from ray_pipeline.settings.run_folder import TOKENIZER

if TYPE_CHECKING:
    from model.transformer import Transformer


@click.command("teacher-topk")
@click.argument("run")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--teacher", help="A stage's or a model's folder. Default: the run's last stage before distillation.")
@click.option(
    "-k", "--k", type=click.IntRange(1, 1 << 24), default=64, show_default=True, help="Tokens kept per position."
)
@click.option("--temperature", type=click.FloatRange(1e-3, 1e3), default=1.0, show_default=True)
@click.option("--output-dir", "runs_dir", help="Folder of all runs. Default: runs.")
def teacher_topk(run: str, folder: Path, teacher: str | None, k: int, temperature: float, runs_dir: str | None) -> int:
    """Write log-probabilities over RUN's conversations to FOLDER, for `--set distillation.teacher=topk:FOLDER`."""
    from ray_pipeline.cli.runs import choose_stage
    from ray_pipeline.data.rows.loader import PackedRows
    from ray_pipeline.settings.chain import POLICY_STAGES
    from ray_pipeline.teachers.top_k import refuse_other_folder, write_top_k

    refuse_other_folder(folder)
    run_dir = find_run(run, output_dir(runs_dir))
    _, data = choose_stage(run_dir, "data_prep", ("data_prep",))
    if teacher is None:
        teacher = str(choose_stage(run_dir, None, POLICY_STAGES)[1])
    model = open_model(teacher, data / TOKENIZER)
    rows = PackedRows(data / "sft" / "train")
    try:
        made = write_top_k(model, rows, data / TOKENIZER, folder, k=k, temperature=temperature)
    except ValueError as error:
        raise UserError(f"--{error}.") from None
    click.echo(f"{made.rows} rows of {made.seq_len} tokens, {made.k} log-probabilities each, in {folder}")
    return 0


def open_model(teacher: str, tokenizer: Path) -> Transformer:
    """The teacher, on a GPU where there is one.

    Raises:
        UserError: no such model, one of another family, or one whose ids mean something else.
    """
    import torch

    from model.convert.hf_load import load_hf
    from model.transformer import Transformer
    from ray_pipeline.teachers.teacher_folder import open_teacher, tokenizer_difference

    found = open_teacher(teacher)
    if found.config is None:
        raise UserError(f"--teacher {teacher}: not a model of this project's or DeepSeek's architecture.")
    if found.tokenizer is None:
        raise UserError(f"--teacher {teacher}: there is no tokenizer.json with it. Add it.")
    if difference := tokenizer_difference(found.tokenizer, tokenizer):
        raise UserError(f"--teacher {teacher}: its tokenizer is not the run's ({difference}). Give another teacher.")
    try:
        config, state = load_hf(found.path)
    except ValueError as error:
        raise UserError(f"--teacher {teacher}: {error}") from None
    model = Transformer(config).eval()
    model.load_state_dict(state)
    return model.cuda() if torch.cuda.is_available() else model

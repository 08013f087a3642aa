"""`convert`: a model from one form into another: Hugging Face folder, checkpoint of a run, GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.export import known_kinds
from ray_pipeline.cli.runs import output_dir
from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.settings.section import MOST_SEED

if TYPE_CHECKING:
    from model.convert.folder import Selection
    from ray_pipeline.cli.conversion import Read
    from ray_pipeline.evaluation.proof import Check

FORMS = ("hf", "gguf", "checkpoint")
SHOWN = 6  # names of tensors in a line


@click.command()
@click.argument("model", metavar="IN")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--to", "form", type=click.Choice(FORMS), help="Default: gguf for OUT.gguf, else the other folder.")
@click.option("--quantize", help="Kind of number, for example bfloat16, fp8, q8_0 or q4_k_m. Default: 32 bits.")
@click.option("--include", multiple=True, metavar="GLOB", help="Read these tensors alone (Hugging Face names).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these tensors out: they start anew.")
@click.option("--allow-missing", multiple=True, metavar="GLOB", help="These may be absent: then they start anew.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder of the tokenizer. Default: that of IN.")
@click.option("--licence", default="other", show_default=True, help="Of the weights, for the model card.")
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True, help="Of what starts anew.")
@click.option("--output-dir", "runs_dir", help="Folder of all runs. Default: runs.")
def convert(
    model: str,
    out: Path,
    form: str | None,
    quantize: str | None,
    tokenizer: Path | None,
    licence: str,
    seed: int,
    runs_dir: str | None,
    **patterns: tuple[str, ...],
) -> int:
    """Write IN (a run, RUN:STAGE, a model folder or a .gguf file) in another form to OUT, which must not be there.

    A checkpoint is a folder in this project's own format, which --init-from, eval, chat and serve read. What was
    written is read back and compared before it is put in place.
    """
    from model.convert.folder import Selection

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already, and is not replaced. Give another path, or move it away.")
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {tokenizer}: there is no tokenizer.json. Give a tokenizer's folder.")
    selection = Selection(patterns["include"], patterns["exclude"], patterns["allow_missing"])
    reading, own_form = open_model(model, output_dir(runs_dir), selection, tokenizer, seed)
    form = form or target_form(own_form, out)
    if (form == "gguf") != (out.suffix == ".gguf"):
        wanted = "a name that ends with .gguf" if form == "gguf" else "a folder's name"
        raise UserError(f"{out} with --to {form}: is {'no' if form == 'gguf' else 'a'} .gguf file. Give {wanted}.")
    kind = number_kind(quantize, form)
    click.echo(f"Reading {model} ...")
    with reading as read:
        report(read, selection, seed)

        from ray_pipeline.cli.conversion import check_target, left_out, write

        check_target(read, form)
        if names := left_out(read, form):
            click.echo(f"  {len(names)} are not written, for this form has no place for them: {_listed(names)}")
        click.echo(f"Writing and checking {out} ({form}, {kind}) ...")
        checks = write(read, form, kind, out, licence)
    show(out, checks)
    return 0


def open_model(
    given: str, runs_dir: Path, selection: Selection, tokenizer: Path | None, seed: int
) -> tuple[AbstractContextManager[Read], str]:
    """The model that is meant, not read yet, and its form.

    Raises:
        UserError: nothing of the kind.
    """
    from ray_pipeline.cli.conversion import read_gguf, read_source
    from ray_pipeline.cli.eval_target import find_model

    if Path(given).suffix == ".gguf":
        if not Path(given).is_file():
            raise UserError(f"{given}: no such file. Give a run, a model folder, or a .gguf file.")
        return read_gguf(Path(given), selection, tokenizer, seed), "gguf"
    from model.convert.folder import is_native
    from ray_pipeline.records.artifacts import read_json

    source = find_model(given, None, runs_dir)
    own = source.form == "stage" or is_native(read_json(source.folder / "config.json"))
    return read_source(source, selection, tokenizer, seed), "checkpoint" if own else "hf"


def target_form(own: str, out: Path) -> str:
    """The form that is meant where `--to` says none."""
    if out.suffix == ".gguf":
        return "gguf"
    return "checkpoint" if own == "hf" else "hf"


def number_kind(given: str | None, form: str) -> str:
    """The kind of number that is written.

    Raises:
        UserError: not known, or a kind of another form.
    """
    format_ = "gguf" if form == "gguf" else "hf"
    kinds = [kind for kind, of in known_kinds().items() if of == format_ and (kind, form) != ("fp8", "checkpoint")]
    if given is None:
        return "f32" if form == "gguf" else "float32"
    if given.lower() not in kinds:
        raise UserError(
            f"--quantize {given}: no kind of {form}{did_you_mean(given, kinds)}. There are {', '.join(kinds)}."
        )
    return given.lower()


def report(read: Read, selection: Selection, seed: int) -> None:
    """Tell how many tensors were read, and which were not.

    Raises:
        UserError: a pattern that fits no tensor.
    """
    from model.convert.folder import matches

    found = read.selected
    every = (*found.taken, *found.omitted, *found.missing)
    for option, patterns in (("include", selection.include), ("exclude", selection.exclude)):
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in every):
                raise UserError(
                    f"--{option} {pattern}: fits none of the {len(every)} tensors, which are called like {every[0]}. "
                    "Give a glob of such names."
                )
    click.echo(f"{read.name}: {len(found.taken)} of {len(every)} tensors read.")
    for names, why in ((found.omitted, "left out"), (found.missing, "not there, as allowed")):
        if names:
            click.echo(f"  {len(names)} {why}: these start as in training, from seed {seed}: {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def show(out: Path, checks: list[Check]) -> None:
    """What was compared."""
    from ray_pipeline.report.export_table import print_checks

    print_checks(out, checks)
    click.echo(f"Written to {out}.")

"""`export`: a run's model in other kinds of file, checked as EXPORT checks them, without running a stage again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model.convert.export_kinds import KINDS
from ray_pipeline.cli.runs import output_dir
from ray_pipeline.errors import EXIT_FAILED, StageFailed, UserError, command, did_you_mean
from ray_pipeline.settings.run_folder import CONFIG_FILE, EXPORT_CARD, PROGRESS_FILE

if TYPE_CHECKING:
    from ray_pipeline.evaluation.model_source import ModelSource
    from ray_pipeline.launch.stage_context import StageContext

FORMATS = ("hf", "gguf", "onnx", "coreml")
USUAL = ("hf", "gguf")  # as the stage writes


@dataclass(frozen=True)
class Wanted:
    """What is to be written: formats, kinds of GGUF file (empty: the run's own), the folder's number type and the
    gigabytes of its weight files."""

    formats: tuple[str, ...]
    gguf: tuple[str, ...]
    dtype: str | None
    shard_gb: float | None = None


@click.command()
@click.argument("model")
@click.option("--stage", help="Of the run. Default: the last of pretrain, sft, dpo, grpo; RUN:STAGE says the same.")
@click.option("--format", "formats", help="Of hf,gguf,onnx,coreml. Default: what --quantize asks, else hf,gguf.")
@click.option("--quantize", help="Kinds of number, for example q8_0,f16 or bfloat16. Default: those of the run.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write, new or of this verb.")
@click.option("--licence", help="Of the weights, for the model card. Default: the run's.")
@click.option("--shard-gb", type=click.FloatRange(1e-6, 1e6), help="Of one weight file of the folder. Default: 5.")
@click.option("--push", metavar="USER/NAME", help="Send it to this repository of the Hugging Face Hub, too.")
@click.option("--public", is_flag=True, help="With --push: a new repository is public. Default: private.")
@click.option("--output-dir", "runs_dir", help="Folder of all runs. Default: runs.")
def export(
    model: str,
    stage: str | None,
    formats: str | None,
    quantize: str | None,
    out: Path,
    licence: str | None,
    shard_gb: float | None,
    push: str | None,
    public: bool,
    runs_dir: str | None,
) -> int:
    """Write MODEL (a run, or RUN:STAGE) to --out as a Hugging Face folder, GGUF files, a graph.

    Every file is loaded by the program that it is for and compared with the model. When one differs, nothing is put in
    place; a GGUF kind so coarse that it makes another model is left out alone, and named.
    """
    from ray_pipeline.cli.eval_target import find_model
    from ray_pipeline.cli.hub_upload import check_push
    from ray_pipeline.cli.hub_upload import push as send

    wanted = replace(read_wanted(formats, quantize), shard_gb=shard_gb)
    if public and push is None:
        raise UserError("--public: says how --push makes a repository. Give both, or none.")
    source = find_model(model, stage, output_dir(runs_dir))
    refuse_other_folder(out)
    context = stage_context(source, model, wanted, out, licence)
    if push is not None:
        check_push(push, public=public)
    refused = write(context, wanted, out)
    if push is not None:
        click.echo(f"Sending it to {push} ...")
        click.echo(f"Sent: {send(out, push, public=public)}")
    return EXIT_FAILED if refused else 0


def known_kinds() -> dict[str, str]:
    """Kind of number -> its format."""
    return {kind.name: kind.form for kind in KINDS.values()}


def read_wanted(formats: str | None, quantize: str | None) -> Wanted:
    """What `--format` and `--quantize` ask for together.

    Raises:
        UserError: an unknown name, a kind of a format that is not asked for, or two number types for one folder.
    """
    table = known_kinds()
    kinds = _names("--quantize", quantize, table)
    asked = _names("--format", formats, FORMATS)
    for kind in kinds:
        if asked and table[kind] not in asked:
            raise UserError(
                f"--format {formats} --quantize {quantize}: {kind} is a kind of {table[kind]}. Add {table[kind]} to "
                "--format, or leave the kind out."
            )
    dtypes = [kind for kind in kinds if table[kind] == "hf"]
    if len(dtypes) > 1:
        raise UserError(f"--quantize {quantize}: one folder holds one of {' and '.join(dtypes)}. Give one of them.")
    gguf = tuple(kind for kind in kinds if table[kind] == "gguf")
    wanted = asked or [name for name in USUAL if name in {table[kind] for kind in kinds}] or USUAL
    return Wanted(tuple(wanted), gguf, dtypes[0] if dtypes else None)


def _names(option: str, given: str | None, known: Sequence[str] | dict[str, str]) -> list[str]:
    """Names between commas, each once."""
    names = list(dict.fromkeys(name.strip().lower() for name in (given or "").split(",") if name.strip()))
    if given is not None and not names:
        raise UserError(f'{option} "{given}": names nothing. Known are {", ".join(known)}.')
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name}: not known{did_you_mean(name, known)}. Known are {', '.join(known)}.")
    return names


def refuse_other_folder(out: Path) -> None:
    """Raises UserError where `--out` is there and is no folder that this verb wrote."""
    from ray_pipeline.records.integrity import manifest_files, refuse_foreign_folder

    refuse_foreign_folder(out)
    if not out.exists() or not any(out.iterdir()):
        return
    if manifest_files(out).keys().isdisjoint({EXPORT_CARD, "checks.json"}):  # the latter in earlier versions
        raise UserError(
            f"--out {out}: there is another folder already, which this verb did not write and does not replace. Give "
            "another path, or move it away."
        )


def stage_context(source: ModelSource, given: str, wanted: Wanted, out: Path, licence: str | None) -> StageContext:
    """What EXPORT would be given, were the stage the last of its run and `out` its folder.

    Raises:
        UserError: no stage of a run, a stage that is not whole, or an architecture that a format has no place for.
    """
    from ray_pipeline.dag.ledger import read_record
    from ray_pipeline.launch.stage_context import StageContext, StageResult
    from ray_pipeline.settings.loading import load_config

    folder, run_dir = source.folder.parent, source.folder.parent.parent
    record = read_record(folder) if source.form == "stage" else None
    if record is None or not (run_dir / CONFIG_FILE).is_file():
        raise UserError(
            f"{given}: names no training stage of a run. Give a run or RUN:STAGE; `{command('convert', given)} OUT` "
            "writes a model folder in another form."
        )
    overrides: dict[str, Any] = {
        "run_name": run_dir.name, "output_dir": str(run_dir.parent), "export.source": record.stage
    }  # fmt: skip
    shard = None if wanted.shard_gb is None else max(1, int(wanted.shard_gb * 1e9))
    asked = {"gguf": list(wanted.gguf), "dtype": wanted.dtype, "licence": licence, "max_shard_bytes": shard}
    overrides |= {f"export.{key}": value for key, value in asked.items() if value}
    config = load_config(run_dir / CONFIG_FILE, overrides)
    if record.stage != "distillation":  # which EXPORT would write beside the model
        config = config.model_copy(update={"stages": [name for name in config.stages if name != "distillation"]})
    _check_formats(source, config.export.gguf, wanted)
    inputs = {"data_prep": StageResult(source.tokenizer.parent), record.stage: record.result(folder)}
    return StageContext(config, run_dir.name, run_dir, out, inputs, launcher=_NoRanks())


class _NoRanks:
    """EXPORT starts none."""

    def run(self, name: str, function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError(f"{name}: an export starts no ranks")


def _check_formats(source: ModelSource, kinds: Sequence[str], wanted: Wanted) -> None:
    """Refuse what EXPORT would leave out: here it was asked for by name."""
    from model.convert.coreml_file import coreml_missing
    from model.convert.gguf_rules import check_gguf
    from model.convert.onnx_file import onnx_missing
    from ray_pipeline.records.artifacts import read_model_config

    for name, missing in (("onnx", onnx_missing), ("coreml", coreml_missing)):
        if name in wanted.formats and (found := missing()) is not None:
            raise UserError(f"--format {name} needs {found}")
    if "gguf" not in wanted.formats:
        return
    if not kinds:
        raise UserError(
            f"{source.name}: its run has export.gguf=[], no kind of GGUF file. Name them, for example --quantize "
            "f16,q8_0, or leave them out with --format hf."
        )
    try:
        check_gguf(read_model_config(source.folder))
    except ValueError as error:
        reason = str(error).replace("et export.gguf=[]", "et --format hf")
        raise UserError(f"GGUF of {source.name}: {reason}") from None


def write(context: StageContext, wanted: Wanted, out: Path) -> list[str]:
    """Write aside, check, put in place, and print what was checked.

    Returns:
        Files that were left out, because their rounding makes another model.
    Raises:
        StageFailed: a file that is not the model; nothing is left in `out`.
    """
    from ray_pipeline.evaluation.proof import Check
    from ray_pipeline.records.artifacts import atomic_folder
    from ray_pipeline.records.integrity import read_sealed
    from ray_pipeline.report.export_table import print_checks
    from ray_pipeline.stages import export as stage

    click.echo(f"Writing {' and '.join(wanted.formats)} of {context.run_name} to {out} ...")
    with atomic_folder(out) as aside:
        try:
            stage.run(replace(context, folder=aside), formats=wanted.formats)
        except StageFailed as error:
            raise StageFailed(f"{error} Nothing was put into {out}.", error.details) from None
        (aside / PROGRESS_FILE).unlink()
    card = read_sealed(out / EXPORT_CARD, "Export again.")
    print_checks(out, [Check(**{**check, "notes": tuple(check["notes"])}) for check in card["checks"]])
    for program, why in card["not_asked"].items():
        click.echo(f"Not asked: {program} ({why}).")
    refused = [check["name"] for check in card["checks"] if check["status"] == "refused"]
    if refused:
        click.echo(f"REFUSED: {', '.join(refused)}: rounding makes another model of it. Choose a finer kind.", err=True)
    return refused

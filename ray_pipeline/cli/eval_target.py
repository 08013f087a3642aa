"""Which model `eval` means: a run, one of its stages' folders, or a model folder from elsewhere. Loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.cli.runs import bring_named, choose_stage, finished_stages, list_runs, no_runs
from ray_pipeline.errors import UserError, did_you_mean, resume_command
from ray_pipeline.settings.chain import POLICY_STAGES
from ray_pipeline.settings.run_folder import CONFIG_FILE, HELDOUT_QUESTIONS, MODEL, RECORD, TOKENIZER

if TYPE_CHECKING:
    from ray_pipeline.evaluation.model_source import ModelSource

# By default the last finished policy answers. The student and the exports are asked for by name.
BY_NAME = ("distillation", "export")
EXPORTED = ("hf", "native")


def find_model(
    given: str, stage: str | None, runs_dir: Path, *, default: Callable[[Path], tuple[str, ...]] | None = None
) -> ModelSource:
    """What `given` names: a run (by name or folder, `RUN:STAGE` for one of its stages), a stage's folder, or a model's.

    Args:
        default: a run's folder -> the stages of which the last finished one is meant where none is named; else the
            policies, and those of `BY_NAME` only in their absence.
    Raises:
        UserError: nothing of the kind, a stage that is not finished, or a damaged folder.
    """
    run, colon, named = given.rpartition(":")
    bring_named(run or given, runs_dir)
    is_run = (runs_dir / run / CONFIG_FILE).is_file() or named in POLICY_STAGES + BY_NAME
    if colon and is_run and not Path(given).exists():
        if stage not in (None, named):
            raise UserError(f"{given} with --stage {stage}: two stages. Give one of them.")
        given, stage = run, named
    path = Path(given)
    for run_dir in (runs_dir / given, path):
        if (run_dir / CONFIG_FILE).is_file():
            return _of_run(run_dir.absolute(), stage, default)
    if not path.is_dir():
        known = [run.name for run in list_runs(runs_dir)]
        if not known:
            raise UserError(f'"{given}": no model folder, and {no_runs(runs_dir)}')
        raise UserError(
            f'"{given}": neither a run in {runs_dir}{did_you_mean(given, known)} nor a folder. The runs there are '
            f"{', '.join(known[:10])}. Give a run, or the path of a model folder."
        )
    if stage is not None:
        raise UserError(f"--stage {stage}: {given} is a folder and no run. Leave it out.")
    return _of_folder(path)


def was_pretrained(source: ModelSource) -> bool:
    """Whether its run has PRETRAIN, whose documents begin with bos, whatever the tokenizer says of itself."""
    from ray_pipeline.dag.ledger import RunFile

    run_dir = source.folder.parent.parent
    return source.form == "stage" and (run_dir / CONFIG_FILE).is_file() and "pretrain" in RunFile(run_dir).chain


def _of_run(run_dir: Path, stage: str | None, default: Callable[[Path], tuple[str, ...]] | None) -> ModelSource:
    finished = finished_stages(run_dir)
    candidates: tuple[str, ...] = POLICY_STAGES + BY_NAME
    if stage is None and default is not None:
        candidates = default(run_dir)
    elif stage is None and any(name in finished for name in POLICY_STAGES):
        candidates = POLICY_STAGES
    name, folder = choose_stage(run_dir, stage, candidates)
    if name == "export":
        return _exported(folder, run_dir, finished)
    return _trained(folder, f"{run_dir.name} ({name})", run_dir, finished.get("data_prep"))


def _trained(folder: Path, name: str, run_dir: Path, data: Path | None) -> ModelSource:
    from ray_pipeline.evaluation.model_source import ModelSource

    if data is None or not data.is_dir():
        way_out = f"Use `{resume_command(run_dir)}`"
        raise UserError(f"run {run_dir.name}: its data_prep stage is gone, and the tokenizer with it. {way_out}.")
    source = ModelSource(name, folder / MODEL, data / TOKENIZER, "stage")
    return _with_run(source, run_dir, data)


def _exported(folder: Path, run_dir: Path, finished: dict[str, Path]) -> ModelSource:
    from ray_pipeline.evaluation.model_source import describe_folder

    place = next((folder / name for name in EXPORTED if (folder / name).is_dir()), None)
    if place is None:
        raise UserError(f"{folder}: holds neither {' nor '.join(EXPORTED)}. Run the stage again: --stage export.")
    source = describe_folder(place, name=f"{run_dir.name} (export)")
    return _with_run(source, run_dir, finished.get("data_prep"))


def _with_run(source: ModelSource, run_dir: Path, data: Path | None) -> ModelSource:
    """Add what the run knows: its held-out questions and how long its answers may be."""
    heldout = None if data is None else data / HELDOUT_QUESTIONS
    return replace(source, heldout=heldout, **_settings(run_dir))


def _settings(run_dir: Path) -> dict[str, Any]:
    """How the run's own evaluation asks: the length of answers, and tools.

    Raises:
        UserError: the run's settings are damaged.
    """
    from pydantic import ValidationError

    from ray_pipeline.settings.layers import yaml_layer
    from ray_pipeline.settings.post_training import EvaluationConfig, ToolsConfig

    values = yaml_layer(run_dir / CONFIG_FILE).values
    try:
        length = EvaluationConfig.model_validate(values.get("evaluation", {})).max_new_tokens
        return {"max_new_tokens": length, "tools": ToolsConfig.model_validate(values.get("tools", {}))}
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        raise UserError(f"{run_dir / CONFIG_FILE}: {where}: {found['msg']}. Put back a copy of the file.") from None


def _of_folder(path: Path) -> ModelSource:
    from ray_pipeline.evaluation.model_source import describe_folder

    stage = path.parent if path.name == MODEL and (path.parent / RECORD).is_file() else path
    if (stage / RECORD).is_file() and (stage.parent / CONFIG_FILE).is_file():
        return _of_stage_folder(stage.absolute())
    source = describe_folder(path.absolute())
    return _of_export(source, path.absolute()) if (path.parent / RECORD).is_file() else source


def _of_export(source: ModelSource, folder: Path) -> ModelSource:
    """A folder that EXPORT wrote, where it wrote it: its run's questions are at hand."""
    run_dir = folder.parent.parent
    if not (run_dir / CONFIG_FILE).is_file():
        return source
    return replace(
        _with_run(source, run_dir, finished_stages(run_dir).get("data_prep")), name=f"{run_dir.name} ({folder.name})"
    )


def _of_stage_folder(folder: Path) -> ModelSource:
    """A stage's folder inside its run: the tokenizer is of the DATA_PREP that this very stage read."""
    from ray_pipeline.dag.ledger import read_record

    record, run_dir = read_record(folder), folder.parent
    if record is None or not record.is_finished:
        status = "missing" if record is None else record.status
        raise UserError(
            f"{folder}: the stage is not finished (its record is {status}). Go on with `{resume_command(run_dir)}`."
        )
    name = record.upstream.get("data_prep")
    data = run_dir / name if name else finished_stages(run_dir).get("data_prep")
    if record.stage == "export":
        return _exported(folder, run_dir, {} if data is None else {"data_prep": data})
    if not (folder / MODEL).is_dir():
        raise UserError(f"{folder}: the stage {record.stage} makes no model. Give the folder of a stage that trains.")
    return _trained(folder, f"{run_dir.name} ({record.stage})", run_dir, data)

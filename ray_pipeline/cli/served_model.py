"""Which model `serve` means: all that `eval` takes, RUN:STAGE, and .gguf files. Loads no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ray_pipeline.cli.eval_target import BY_NAME, POLICIES, find_model
from ray_pipeline.cli.runs import CONFIG_FILE
from ray_pipeline.errors import UserError

if TYPE_CHECKING:
    from model.config import ModelConfig
    from ray_pipeline.evaluation.model_source import ModelSource
    from ray_pipeline.serving.engines import ServedModel

GGUF_KINDS = ("f16", "bf16", "q8_0", "f32")  # of EXPORT's files, the first that is there


def find_served(given: str, runs_dir: Path) -> ServedModel:
    """The model that `given` names.

    Raises:
        UserError: nothing of the kind, not finished, or damaged.
    """
    from ray_pipeline.serving.engines import ServedModel
    from ray_pipeline.serving.gguf_file import check_gguf_file

    path = Path(given)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{given}: no such file. Give a run, a model folder, or a .gguf file.")
        check_gguf_file(path)
        return ServedModel(path.stem, None, path.absolute(), None)
    name, stage = split_stage(given, runs_dir)
    source = find_model(name, stage, runs_dir)
    return ServedModel(_short(source.name), source, _exported_gguf(source), _config(source), _bos(source))


def split_stage(given: str, runs_dir: Path) -> tuple[str, str | None]:
    """RUN:STAGE taken apart; anything else as it is."""
    name, colon, stage = given.rpartition(":")
    if colon and (stage in POLICIES + BY_NAME or (runs_dir / name / CONFIG_FILE).is_file()):
        return name, stage
    return given, None


def _short(name: str) -> str:
    """ "run (grpo)" -> "run:grpo", as it would be typed."""
    return name.replace(" (", ":").rstrip(")")


def _config(source: ModelSource) -> ModelConfig | None:
    from model.convert.folder import describe
    from ray_pipeline.records.artifacts import read_model_config

    if source.form == "stage":
        return read_model_config(source.folder)
    return describe(source.folder).config if source.form == "folder" else None


def _bos(source: ModelSource) -> bool:
    """PRETRAIN's documents begin with bos, whatever the run's tokenizer says of itself."""
    from model.convert.tokenizer_start import begins_with_bos
    from ray_pipeline.dag.ledger import RunFile

    run_dir = source.folder.parent.parent
    if source.form == "stage" and "pretrain" in RunFile(run_dir).chain:
        return True
    source.read_tokenizer()  # refuses a damaged one by its own name
    return begins_with_bos(source.tokenizer)


def _exported_gguf(source: ModelSource) -> Path | None:
    """The GGUF file that EXPORT wrote of these very weights, if it did."""
    from ray_pipeline.cli.runs import finished_stages
    from ray_pipeline.dag.ledger import read_record
    from ray_pipeline.evaluation.model_source import describe_folder  # noqa: F401

    stage_folder = source.folder.parent
    run_dir = stage_folder.parent
    if not (run_dir / CONFIG_FILE).is_file():
        return None
    if source.form == "folder" and source.folder.name == "hf":
        export: Path | None = stage_folder
    else:
        export = finished_stages(run_dir).get("export")
        record = None if export is None else read_record(export)
        if record is None or not _is_first_upstream(record.upstream, stage_folder.name):
            return None
    files = [export / f"model-{kind}.gguf" for kind in GGUF_KINDS] if export is not None else []
    return next((path for path in files if path.is_file()), None)


def _is_first_upstream(upstream: dict[str, str], folder: str) -> bool:
    """Whether EXPORT's GGUF files hold this stage's weights: the last but the student."""
    trained = [name for name in upstream if name in POLICIES]
    return bool(trained) and upstream[max(trained, key=POLICIES.index)] == folder

"""Which model `serve` means: all that `eval` takes, RUN:STAGE, and .gguf files. Loads no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ray_pipeline.cli.eval_target import find_model, was_pretrained
from ray_pipeline.errors import UserError
from ray_pipeline.records.integrity import verify_files
from ray_pipeline.settings.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from model.config import ModelConfig
    from ray_pipeline.evaluation.model_source import ModelSource
    from ray_pipeline.serving.engines import ServedModel

# Of EXPORT's files, the first that is there.
GGUF_KINDS = ("f16", "bf16", "q8_0", "f32", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")


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
        verify_files(path.absolute().parent, [path.name])
        check_gguf_file(path)
        return ServedModel(path.stem, None, path.absolute(), None)
    source = find_model(given, None, runs_dir)
    return ServedModel(_short(source.name), source, _exported_gguf(source), _config(source), _bos(source))


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
    """Whether its documents begin with bos."""
    from model.convert.tokenizer_start import begins_with_bos

    if was_pretrained(source):
        return True
    source.read_tokenizer()  # refuses a damaged one by its own name
    return begins_with_bos(source.tokenizer)


def _exported_gguf(source: ModelSource) -> Path | None:
    """The GGUF file that EXPORT wrote of these very weights, if it did."""
    from ray_pipeline.cli.runs import finished_stages
    from ray_pipeline.dag.ledger import read_record

    stage_folder = source.folder.parent
    run_dir = stage_folder.parent
    if not (run_dir / CONFIG_FILE).is_file():
        return None
    if source.form == "folder" and source.folder.name == "hf":
        return _first_gguf(stage_folder)
    export = finished_stages(run_dir).get("export")
    record = None if export is None else read_record(export)
    if export is None or record is None:
        return None
    # What it read behind data_prep: the stage it writes, then a student (`settings.chain.upstream`).
    read = [folder for stage, folder in record.upstream.items() if stage != "data_prep"]
    return _first_gguf(export) if read[:1] == [stage_folder.name] else None


def _first_gguf(export: Path) -> Path | None:
    files = [export / f"model-{kind}.gguf" for kind in GGUF_KINDS]
    found = next((path for path in files if path.is_file()), None)
    if found is not None:
        verify_files(export, [found.name])
    return found

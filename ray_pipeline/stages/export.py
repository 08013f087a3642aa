"""EXPORT: the trained model as Hugging Face folder and GGUF files, the student beside it; each is loaded and compared.

An architecture that transformers or llama.cpp has no class for is written in this project's own format instead, in a
folder called native.

Every artifact is checked before it is put in place, and whole or absent, so a stage that is killed goes on behind the
last one it finished.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path

from model.convert.tokenizer_start import with_bos
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.errors import StageFailed
from ray_pipeline.evaluation.export_card import write_card
from ray_pipeline.evaluation.proof import Check
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.progress import Progress
from ray_pipeline.settings.chain import exported_stage, lineage
from ray_pipeline.settings.run_folder import TOKENIZER
from ray_pipeline.stages.export_model import Exporter

STAGE = "export"


def exported_models(context: StageContext) -> dict[str, str]:
    """Folder name -> stage whose weights it holds."""
    source = exported_stage(context.config)
    assert source is not None, "the settings were checked: a run with EXPORT trains something"
    beside = "distillation" in context.config.stages and source != "distillation"
    return {"hf": source} | ({"hf-student": "distillation"} if beside else {})


def run(context: StageContext, formats: Collection[str] = ("hf", "gguf")) -> StageResult:
    """Write, reload, compare, and put in place what is the model.

    Args:
        formats: "hf" (a folder, also of our own format) and "gguf"; the verb `export` may ask for one alone, and for
            "onnx" and "coreml".
    Raises:
        UserError: an upstream model that is damaged, or one GGUF cannot hold.
        StageFailed: an exported file that does not give what the model gives, with the figures; or nothing but kinds
            whose rounding makes another model of it. One of these among others is left out, and named.
    """
    models = exported_models(context)
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as aside:
        tokenizers = {place: _tokenizer_of(context, stage, Path(aside, place)) for place, stage in models.items()}
        files = len(models) + len(context.config.export.gguf) + len({"onnx", "coreml"} & set(formats))
        progress = Progress(context.folder, STAGE, files)
        for place, stage in models.items():
            checks += Exporter(context, place, stage, tokenizers[place], progress).run(formats)
    write_card(context.folder, checks)
    _raise_failures(checks)
    metrics: dict[str, float] = {}
    for check in checks:  # the first program is the one that the file is for
        figures = {f"{check.name}/{figure}": value for figure, value in check.figures.items()}
        metrics = figures | metrics
    named = {status: {check.name for check in checks if check.status == status} for status in ("passed", "refused")}
    for name in sorted(named["refused"]):
        metrics[f"{name}/refused"] = 1.0
    metrics["checks_passed"] = float(len(named["passed"]))
    metrics["checks_not_run"] = float(len({check.name for check in checks} - named["passed"] - named["refused"]))
    return StageResult(context.folder, metrics)


def _tokenizer_of(context: StageContext, stage: str, aside: Path) -> Path:
    """The folder of the tokenizer whose plain text begins as the stage's model has seen it: with bos, as PRETRAIN's
    documents do, or as the tokenizer of given weights has it."""
    folder = context.inputs["data_prep"].folder / TOKENIZER
    load_tokenizer(folder)  # refuses a damaged one by its own name
    return with_bos(folder, aside) if "pretrain" in lineage(context.config, stage) else folder


def _raise_failures(checks: list[Check]) -> None:
    failed = [check for check in checks if check.status == "failed"]
    refused = [check for check in checks if check.status == "refused"]
    if not failed and {check.name for check in refused} == {check.name for check in checks}:
        failed = refused  # nothing is left
    if failed:
        lines = [f"{check.name}: {check.detail}" for check in failed]
        figures = [f"{check.name}: {json.dumps(check.figures)}" for check in failed]
        raise StageFailed("EXPORT: what was written is not the model. " + " | ".join(lines), "\n".join(figures))

"""EXPORT: the trained model as Hugging Face folder and GGUF files, the student beside it; each is loaded and compared.

An architecture that transformers or llama.cpp has no class for is written in this project's own format instead, in a
folder called native.

Every artifact is whole or absent, so a stage that is killed goes on behind the last one it finished.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from model.convert.card import model_card
from model.convert.gguf import save_gguf
from model.convert.gguf_rules import check_gguf as check_gguf_config
from model.convert.gguf_rules import gguf_gap
from model.convert.gguf_tokenizer import read_tokenizer
from model.convert.hf import save_hf
from model.convert.hf_config import unpublished_reason
from model.convert.native import save_native
from model.convert.tokenizer_start import begins_with_bos, with_bos
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.tasks.question import prepared_questions
from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.evaluation.export_checks import Check, check_gguf, check_hf, check_native
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.artifacts import (
    atomic_folder,
    atomic_path,
    load_model,
    manifest_entries,
    write_json,
    write_sealed,
)
from ray_pipeline.records.integrity import files_damage, manifest_files, verify_folder
from ray_pipeline.records.progress import Progress
from ray_pipeline.settings.chain import exported_stage, lineage, reads_folder
from ray_pipeline.settings.run_folder import MANIFEST, MODEL, TOKENIZER

STAGE = "export"
CHECKED_QUESTIONS = 8


def exported_models(context: StageContext) -> dict[str, str]:
    """Folder name -> stage whose weights it holds."""
    source = exported_stage(context.config)
    assert source is not None, "the settings were checked: a run with EXPORT trains something"
    beside = "distillation" in context.config.stages and source != "distillation"
    return {"hf": source} | ({"hf-student": "distillation"} if beside else {})


def run(context: StageContext, formats: Collection[str] = ("hf", "gguf")) -> StageResult:
    """Write, reload and compare.

    Args:
        formats: "hf" (a folder, also of our own format) and "gguf"; the verb `export` may ask for one alone.
    Raises:
        UserError: an upstream model that is damaged, or one GGUF cannot hold.
        StageFailed: an exported file that does not give what the model gives, with the figures.
    """
    models = exported_models(context)
    with tempfile.TemporaryDirectory() as aside:
        tokenizers = {place: _tokenizer_of(context, stage, Path(aside, place)) for place, stage in models.items()}
        checks = _write_and_check(context, models, tokenizers, formats)
    write_json(context.folder / "checks.json", [check.as_json() for check in checks])
    _raise_failures(checks)
    metrics = {f"{check.name}/{figure}": value for check in checks for figure, value in check.figures.items()}
    metrics["checks_passed"] = float(sum(check.status == "passed" for check in checks))
    metrics["checks_not_run"] = float(sum(check.status == "not run" for check in checks))
    return StageResult(context.folder, metrics)


def _tokenizer_of(context: StageContext, stage: str, aside: Path) -> Path:
    """The folder of the tokenizer whose plain text begins as the stage's model has seen it: with bos, as PRETRAIN's
    documents do, or as the tokenizer of given weights has it."""
    folder = context.inputs["data_prep"].folder / TOKENIZER
    load_tokenizer(folder)  # refuses a damaged one by its own name
    return with_bos(folder, aside) if "pretrain" in lineage(context.config, stage) else folder


def _write_and_check(
    context: StageContext, models: dict[str, str], tokenizers: dict[str, Path], formats: Collection[str]
) -> list[Check]:
    kinds, questions = context.config.export.gguf if "gguf" in formats else [], _questions(context)
    progress = Progress(context.folder, STAGE, 2 * (len(models) + len(kinds)))
    done = 0
    checks: list[Check] = []
    for place, stage in models.items():
        tokenizer_folder = tokenizers[place]
        tokenizer, begins = load_tokenizer(tokenizer_folder), begins_with_bos(tokenizer_folder)
        model = _finite_model(context.inputs[stage].folder / MODEL)
        reason = unpublished_reason(model.config)
        name = place if reason is None else place.replace("hf", "native")
        first = place == "hf"
        gap = gguf_gap(model.config)
        if first and kinds and gap is None:
            _check_convertible(model, tokenizer_folder)
        if "hf" in formats:
            progress.phase(f"writing {name}")
            _write_folder(context, name, stage, model, tokenizer_folder)
        progress.update(done := done + 1)
        for kind in kinds if first else ():
            if gap is not None:
                checks.append(Check(_gguf_path(context, kind).name, "not run", detail=f"not written: {gap}"))
            else:
                progress.phase(f"writing and checking {kind} GGUF")
                _write_gguf(context, kind, model, tokenizer_folder)
                path = _gguf_path(context, kind)
                checks.append(check_gguf(path, kind, model, tokenizer, questions, begins=begins))
            progress.update(done := done + 2)
        if "hf" in formats:
            progress.phase(f"checking {name}")
            check = check_hf if reason is None else check_native
            checks.append(check(context.folder / name, _rounded(context, model), tokenizer, questions, begins=begins))
        progress.update(done := done + 1)
    return checks


def _finite_model(folder: Path) -> Transformer:
    """Raises UserError where a weight is no number: no other program would do more with it than this one."""
    model = load_model(folder).eval()
    spoiled = next((name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())), None)
    if spoiled is not None:
        raise UserError(f"{folder}: {spoiled} is not finite. Train the stage again, with a lower rate.")
    return model


def _questions(context: StageContext) -> list[str]:
    path = context.inputs["data_prep"].folder / "prompts" / "heldout.jsonl"
    return [question["prompt"] for question in prepared_questions(path, CHECKED_QUESTIONS)]


def _check_convertible(model: Transformer, tokenizer_folder: Path) -> None:
    """Before anything is written: the reason why llama.cpp could not run this model, as the user's mistake."""
    try:
        check_gguf_config(model.config)
        read_tokenizer(tokenizer_folder, model.config.vocab_size)
    except ValueError as error:
        raise UserError(f"GGUF: {error}") from None


def _dtype(context: StageContext) -> torch.dtype:
    return getattr(torch, context.config.export.dtype)


def _rounded(context: StageContext, model: Transformer) -> Transformer:
    """The model with weights rounded as they are stored, computing in fp32. The balancing bias is stored in fp32."""
    state = model.state_dict()
    for name, tensor in state.items():
        if not name.endswith("e_score_correction_bias"):
            tensor.copy_(tensor.to(_dtype(context)).float())
    return model


def _write_folder(context: StageContext, name: str, stage: str, model: Transformer, tokenizer_folder: Path) -> None:
    folder = context.folder / name
    if folder.exists():
        try:
            verify_folder(folder)
        except UserError:
            pass  # damaged since: written again below
        else:
            return
    save = save_hf if unpublished_reason(model.config) is None else save_native
    with atomic_folder(folder) as aside:
        save(
            aside,
            model.config,
            model.state_dict(),
            tokenizer_folder=tokenizer_folder,
            dtype=_dtype(context),
            model_card=_card(context, stage, model),
            generation={"do_sample": True, "temperature": context.config.grpo.temperature},
        )


def _gguf_path(context: StageContext, kind: str) -> Path:
    return context.folder / f"model-{kind}.gguf"


def _write_gguf(context: StageContext, kind: Any, model: Transformer, tokenizer_folder: Path) -> None:
    path = _gguf_path(context, kind)
    if _is_as_written(path):
        return  # the stage's identity covers the weights
    with atomic_path(path) as aside:
        save_gguf(
            aside,
            model.config,
            model.state_dict(),
            kind=kind,
            tokenizer_folder=tokenizer_folder,
            name=context.run_name,
            licence=context.config.export.licence,
        )
    _list_file(path)


def _is_as_written(path: Path) -> bool:
    """Whether the file is there, and what the folder's manifest lists."""
    try:
        files = manifest_files(path.parent)
    except ValueError:
        return False
    return path.name in files and files_damage(path.parent, {path.name: files[path.name]}) is None


def _list_file(path: Path) -> None:
    """Enter the file in the folder's manifest, beside those that are there."""
    try:
        listed = manifest_files(path.parent)
    except ValueError:
        listed = {}
    entries = {name: {"sha256": sha256, "bytes": size} for name, (sha256, size) in listed.items()}
    write_sealed(path.parent / MANIFEST, {"files": entries | manifest_entries(path.parent, [path])})


def _card(context: StageContext, stage: str, model: Transformer) -> str:
    config, result = context.config, context.inputs[stage]
    stages = lineage(config, stage)
    data = {source.name: source.licence for source in config.data.pretrain if "pretrain" in stages}
    data |= {f"conversations: {config.data.sft}": "see source", f"questions: {config.data.prompts}": "see source"}
    if "dpo" in stages:
        data[f"preferences: {config.data.preferences}"] = "see source"
    recipe: dict[str, float | str] = {"recipe": config.recipe, "seed": str(config.seed), "weights of stage": stage}
    if reads_folder(config, stages[0]):
        recipe["starts from"] = Path(str(config.init_from.path)).name
    for name in stages:
        settings = getattr(config, name)
        recipe[f"{name} steps"] = str(settings.steps)
        recipe[f"{name} learning rate"] = settings.optimizer.lr
    if "distillation" in stages:
        recipe["distillation loss"] = config.distillation.loss
        if config.distillation.teacher is not None:
            recipe["teacher"] = Path(config.distillation.teacher).name
    return model_card(
        f"{context.run_name} ({stage})",
        model.config,
        licence=context.config.export.licence,
        data=data,
        recipe=recipe,
        figures=result.metrics,
        baselines=result.baselines,
    )


def _raise_failures(checks: list[Check]) -> None:
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        lines = [f"{check.name}: {check.detail}" for check in failed]
        figures = [f"{check.name}: {json.dumps(check.figures)}" for check in failed]
        raise StageFailed("EXPORT: what was written is not the model. " + " | ".join(lines), "\n".join(figures))

"""One model of a run as files: written aside, checked, and put in place where every program agrees with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model.convert.coreml_file import NotConvertible, converter, save_coreml
from model.convert.export_kinds import KINDS, ONNX, GgufKind
from model.convert.ggml import QuantiserMissing, check_quantiser
from model.convert.gguf import Importance, save_gguf
from model.convert.gguf_rules import check_gguf as check_gguf_config
from model.convert.gguf_rules import gguf_gap
from model.convert.gguf_tokenizer import read_tokenizer
from model.convert.hf import save_hf
from model.convert.hf_config import unpublished_reason
from model.convert.importance import importance_matrix
from model.convert.native import save_native
from model.convert.onnx_file import save_onnx
from model.convert.tokenizer_start import begins_with_bos
from model.transformer import Transformer
from ray_pipeline.data.chat.ollama import modelfile
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.tasks.question import prepared_questions
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.export_card import card_of, proof_section
from ray_pipeline.evaluation.export_checks import Export, check_export, native
from ray_pipeline.evaluation.heldout_text import heldout_text
from ray_pipeline.evaluation.proof import Check, Material
from ray_pipeline.evaluation.proof_programs import OurProgram
from ray_pipeline.evaluation.rounding_cost import HeldOut, RoundingCost
from ray_pipeline.launch.stage_context import StageContext
from ray_pipeline.records.artifacts import (
    atomic_folder,
    atomic_path,
    load_model,
    manifest,
    manifest_entries,
    write_sealed,
    write_text,
)
from ray_pipeline.records.integrity import files_damage, manifest_files, verify_folder
from ray_pipeline.records.progress import Progress
from ray_pipeline.settings.run_folder import HELDOUT_QUESTIONS, MANIFEST, MODEL

CHECKED_QUESTIONS = 8  # whose answers are compared token by token
MARKED_QUESTIONS = 24  # whose answers are marked, of rounded kinds


class _NotTheModel(Exception):
    """Keeps an export from being put in place; carries the checks that say why."""

    def __init__(self, checks: list[Check]):
        super().__init__()
        self.checks = checks


@dataclass
class Exporter:
    """Exports one model of the run. `place`: hf, or hf-student."""

    context: StageContext
    place: str
    stage: str
    tokenizer: Path
    progress: Progress
    done: list[Check] = field(default_factory=list)

    def run(self, formats: Collection[str]) -> list[Check]:
        """GGUF files first, so that the folder's model card can tell of them."""
        kinds = self.context.config.export.gguf if "gguf" in formats and self.place == "hf" else []
        gap = gguf_gap(self.model.config)
        if kinds and gap is None:
            _check_convertible(self.model, self.tokenizer, kinds)
        for kind in kinds:
            self._export_gguf(kind, gap)
        if "onnx" in formats and self.place == "hf":
            self._export_onnx()
        if "coreml" in formats and self.place == "hf":
            self._export_coreml()
        if "hf" in formats:
            self._export_folder()
        return self.done

    @cached_property
    def model(self) -> Transformer:
        """As it was trained, on the CPU in fp32."""
        return _finite_model(self.context.inputs[self.stage].folder / MODEL)

    @cached_property
    def material(self) -> Material:
        """What every program is asked."""
        prompts = [question["prompt"] for question in self.questions[:CHECKED_QUESTIONS]]
        return Material(load_tokenizer(self.tokenizer), prompts, begins_with_bos(self.tokenizer))

    @cached_property
    def questions(self) -> list[dict[str, Any]]:
        """Of the run's held-out ones."""
        path = self.context.inputs["data_prep"].folder / HELDOUT_QUESTIONS
        return prepared_questions(path, MARKED_QUESTIONS)

    @cached_property
    def text(self) -> Any:
        """What the run held out of its text."""
        return heldout_text(self.context.inputs["data_prep"].folder, self.model.config.max_position_embeddings)

    @cached_property
    def importance(self) -> Importance | None:
        """Measured when the first kind asks for it; none where no text was held out."""
        rows = self.text.for_importance()
        return importance_matrix(self.model, rows) if rows else None

    @cached_property
    def cost(self) -> RoundingCost:
        """Measures what rounding costs."""
        tokenizer, model = self.material.tokenizer, self.model
        limit = self.context.config.evaluation.max_new_tokens
        heldout = HeldOut(
            tokenizer, self.text.measured, self.questions, limit, context=model.config.max_position_embeddings
        )
        return RoundingCost(heldout, OurProgram(model, tokenizer, frozenset({tokenizer.eos_id}), []))

    def _export_gguf(self, kind: GgufKind, gap: str | None) -> None:
        path = self.context.folder / f"model-{kind}.gguf"
        if gap is not None:
            self.done.append(Check(path.name, "not run", detail=f"not written: {gap}"))
            return
        self.progress.phase(f"writing and checking {kind} GGUF")
        export = Export(path.name, path, KINDS[kind], self.model, self.material, self.cost)
        self._put(export, atomic_path(path), lambda aside: self._write_gguf(aside, kind), whole=_is_as_written(path))
        if path.is_file():
            beside = path.with_suffix(".Modelfile")
            write_text(beside, self._modelfile(path.name))
            _list_files([path, beside])

    def _write_gguf(self, aside: Path, kind: GgufKind) -> list[str]:
        importance = self.importance if KINDS[kind].weighted else None
        report = save_gguf(
            aside,
            self.model.config,
            self.model.state_dict(),
            kind=kind,
            tokenizer_folder=self.tokenizer,
            name=self.context.run_name,
            licence=self.context.config.export.licence,
            importance=importance,
        )
        plain = KINDS[kind].weighted and importance is None
        return report.notes() + (["rounded without an importance matrix: no text was held out"] if plain else [])

    def _modelfile(self, gguf: str) -> str:
        tokenizer, config = self.material.tokenizer, self.context.config
        return modelfile(
            gguf,
            tokenizer.template,
            begins=self.material.begins,
            stop=[tokenizer.special["eos_token"]],
            parameters={
                "temperature": config.grpo.temperature, "num_ctx": self.model.config.max_position_embeddings
            },
        )  # fmt: skip

    def _export_onnx(self) -> None:
        folder = self.context.folder / ONNX.name
        self.progress.phase("writing and checking ONNX")
        export = Export(folder.name, folder, ONNX, self.model, self.material)
        self._put(export, atomic_folder(folder), self._write_onnx, _is_whole(folder))

    def _export_coreml(self) -> None:
        """Converted and read back, which is all that another machine than a Mac can do."""
        folder = self.context.folder / "coreml"
        self.progress.phase("writing and inspecting Core ML")
        card = card_of(self.context, self.stage, self.model)
        with atomic_folder(folder) as aside:
            try:
                notes = save_coreml(aside, self.model, tokenizer_folder=self.tokenizer, model_card=card)
            except NotConvertible as error:
                raise UserError(f"--format coreml: {error}. Leave it out.") from None
        detail = "converted and read back; Core ML itself runs on Apple's systems alone"
        self.done.append(Check(folder.name, "not run", detail=detail, program=converter(), notes=tuple(notes)))
        self.progress.update(int(self.progress.state["step"]) + 1)

    def _write_onnx(self, aside: Path) -> list[str]:
        card = card_of(self.context, self.stage, self.model)
        return save_onnx(aside, self.model, tokenizer_folder=self.tokenizer, model_card=card)

    def _export_folder(self) -> None:
        published = unpublished_reason(self.model.config) is None
        name = self.place if published else self.place.replace("hf", "native")
        dtype = self.context.config.export.dtype
        kind = KINDS[dtype] if published else native(dtype)
        folder = self.context.folder / name
        self.progress.phase(f"writing and checking {name}")
        export = Export(name, folder, kind, self.model, self.material, self.cost)
        self._put(export, atomic_folder(folder), lambda aside: self._write_folder(aside, published), _is_whole(folder))

    def _write_folder(self, aside: Path, published: bool) -> list[str]:
        (save_hf if published else save_native)(
            aside,
            self.model.config,
            self.model.state_dict(),
            tokenizer_folder=self.tokenizer,
            dtype=getattr(torch, KINDS[self.context.config.export.dtype].stored),
            model_card=card_of(self.context, self.stage, self.model),
            generation={"do_sample": True, "temperature": self.context.config.grpo.temperature},
            max_shard_bytes=self.context.config.export.max_shard_bytes,
        )
        return []

    def _put(
        self, export: Export, place: AbstractContextManager[Path], write: Callable[[Path], list[str]], whole: bool
    ) -> None:
        """Write and check aside, unless it is there whole; put it in place where every program that is here agrees."""
        try:
            if whole:  # the stage's identity covers the weights
                checks = check_export(export)
            else:
                with place as aside:
                    notes = write(aside)
                    checks = check_export(replace(export, path=aside, notes=tuple(notes)))
                    if any(check.status in ("failed", "refused") for check in checks):
                        raise _NotTheModel(checks)
                    if aside.is_dir():
                        with (aside / "README.md").open("a", encoding="utf-8") as card:
                            card.write("\n" + proof_section([*self.done, *checks]))
        except _NotTheModel as refused:
            checks = refused.checks
        self.done += checks
        self.progress.update(int(self.progress.state["step"]) + 1)


def _finite_model(folder: Path) -> Transformer:
    """Raises UserError where a weight is no number: no other program would do more with it than this one."""
    model = load_model(folder).eval()
    spoiled = next((name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())), None)
    if spoiled is not None:
        raise UserError(f"{folder}: {spoiled} is not finite. Train the stage again, with a lower rate.")
    return model


def _check_convertible(model: Transformer, tokenizer_folder: Path, kinds: Sequence[str]) -> None:
    """Before anything is written: the reason why llama.cpp could not run this model, as the user's mistake."""
    try:
        if any(KINDS[kind].weighted for kind in kinds):
            check_quantiser()
        check_gguf_config(model.config)
        read_tokenizer(tokenizer_folder, model.config.vocab_size)
    except QuantiserMissing as error:
        raise UserError(f"export.gguf={list(kinds)}: {error}") from None
    except ValueError as error:
        raise UserError(f"GGUF: {error}") from None


def _is_whole(folder: Path) -> bool:
    """Whether the folder is there, as its manifest lists it; a damaged one is written again."""
    if not folder.exists():
        return False
    try:
        verify_folder(folder)
    except UserError:
        return False
    return True


def _is_as_written(path: Path) -> bool:
    """Whether the file is there, and what the folder's manifest lists."""
    try:
        files = manifest_files(path.parent)
    except ValueError:
        return False
    return path.name in files and files_damage(path.parent, {path.name: files[path.name]}) is None


def _list_files(paths: Sequence[Path]) -> None:
    """Enter files of one folder in its manifest, beside those that are there."""
    folder = paths[0].parent
    try:
        listed = manifest_files(folder)
    except ValueError:
        listed = {}
    entries = {name: {"sha256": sha256, "bytes": size} for name, (sha256, size) in listed.items()}
    write_sealed(folder / MANIFEST, manifest(entries | manifest_entries(folder, paths)))

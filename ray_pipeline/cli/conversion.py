"""What `convert` reads and writes: a model from any form, whole, and the same in another one, compared."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.config import ModelConfig
from model.convert.card import model_card
from model.convert.export_kinds import KINDS
from model.convert.folder import Selection
from model.convert.gguf import save_gguf
from model.convert.gguf_read import gguf_fields, published_in_gguf
from model.convert.gguf_read import read_gguf as read_gguf_file
from model.convert.gguf_rules import check_gguf as check_gguf_config
from model.convert.gguf_tokenizer import read_tokenizer
from model.convert.gguf_vocabulary import write_tokenizer
from model.convert.hf import save_hf, stored
from model.convert.hf_config import FAMILIES, published_family, unpublished_reason
from model.convert.hf_load import load_hf, open_folder, read_state
from model.convert.names import published_slots
from model.convert.native import save_native
from model.convert.selected import Selected, outcome, select
from model.convert.tokenizer_start import begins_with_bos, with_bos
from model.transformer import Transformer
from ray_pipeline.cli.eval_target import was_pretrained
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.evaluation.export_checks import Export, check_export, native
from ray_pipeline.evaluation.model_source import GENERATION, ModelSource
from ray_pipeline.evaluation.proof import Check, Material
from ray_pipeline.records.artifacts import atomic_folder, atomic_path, load_model, read_json, write_manifest
from ray_pipeline.records.integrity import verify_files

if TYPE_CHECKING:
    from torch import Tensor

# What the two programs are asked when they are compared.
QUESTIONS = ("What is 12+34?", "Which is larger, 7 or 11?", "Write a sentence about the sea.")


@dataclass(frozen=True)
class Read:
    """A model that was read.

    Attributes:
        name: for the card. tokenizer: folder. begins: plain text begins with bos. generation: of
            generation_config.json, where there is one.
    """

    name: str
    config: ModelConfig
    selected: Selected
    tokenizer: Path
    begins: bool
    generation: dict[str, Any]

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer, as generation_config.json lists them."""
        listed = self.generation.get("eos_token_id", [])
        return listed if isinstance(listed, list) else [listed]


@contextmanager
def read_gguf(path: Path, selection: Selection, tokenizer: Path | None, seed: int) -> Iterator[Read]:
    """A GGUF file; its tokenizer is made again from its metadata, in a folder that lives as long as the context.

    Raises:
        UserError: damaged, another architecture, or tensors or a tokenizer that cannot be read.
    """
    from ray_pipeline.serving.gguf_file import check_gguf_file

    verify_files(path.absolute().parent, [path.name])
    reader = check_gguf_file(path)
    fields = gguf_fields(reader)
    with tempfile.TemporaryDirectory() as aside:
        try:
            config, selected = read_gguf_file(path, selection, seed=seed, opened=(reader, fields))
        except ValueError as error:
            raise UserError(_with_flags(str(error))) from None
        begins = bool(fields.get("tokenizer.ggml.add_bos_token", False))
        try:
            folder = tokenizer or write_tokenizer(fields, Path(aside, "plain"))
        except ValueError as error:
            raise UserError(f"{path}: {error}. Name the folder of its tokenizer with --tokenizer.") from None
        if begins and not begins_with_bos(folder):
            folder = with_bos(folder, Path(aside, "with_bos"))
        yield Read(path.stem, config, selected, folder, begins_with_bos(folder), {})


@contextmanager
def read_source(source: ModelSource, selection: Selection, tokenizer: Path | None, seed: int) -> Iterator[Read]:
    """A stage of a run, or a model folder.

    Raises:
        UserError: damaged, or an architecture that is none of ours.
    """
    if source.form == "transformers":
        raise UserError(f"{source.folder}: its architecture is none of {', '.join(FAMILIES)}, which are converted.")
    try:
        reader = _read_stage if source.form == "stage" else _read_folder
        config, selected = reader(source.folder, selection, seed)
    except ValueError as error:
        raise UserError(_with_flags(str(error))) from None
    folder = tokenizer or source.tokenizer
    path = source.folder / GENERATION
    generation = read_json(path) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as aside:
        if tokenizer is None and was_pretrained(source) and not begins_with_bos(folder):
            folder = with_bos(folder, Path(aside))
        yield Read(source.name, config, selected, folder, begins_with_bos(folder), generation)


def _read_stage(folder: Path, selection: Selection, seed: int) -> tuple[ModelConfig, Selected]:
    model = load_model(folder)
    return model.config, _all_of(model.config, model.state_dict(), selection, seed)


def _read_folder(folder: Path, selection: Selection, seed: int) -> tuple[ModelConfig, Selected]:
    from model.convert.folder import is_native

    if is_native(read_json(folder / "config.json")):  # its patterns are of published names here too
        config, state = load_hf(folder)
        return config, _all_of(config, state, selection, seed)
    opened = open_folder(folder, selection)
    return opened.config, outcome(opened.config, read_state(opened, seed=seed), opened.slots, opened.stored)


def _all_of(config: ModelConfig, state: dict[str, Tensor], selection: Selection, seed: int) -> Selected:
    return select(config, state, selection, published_slots(config, state), seed=seed)


def _with_flags(message: str) -> str:
    """`model.convert` names the fields of `Selection`; here they are flags."""
    for name in ("exclude", "allow_missing"):
        message = message.replace(f"`{name}`", f"--{name.replace('_', '-')}")
    if "are missing:" in message:
        message += ". --allow-missing GLOB lets them start anew, as in training."
    return message


def check_target(read: Read, form: str) -> None:
    """Raises UserError where the other form has no place for the model, before anything is written."""
    if form == "hf" and (reason := unpublished_reason(read.config)):
        raise UserError(f"{read.name} as a Hugging Face folder: {reason}. Use --to checkpoint.")
    if form == "gguf":
        try:
            check_gguf_config(read.config)
            read_tokenizer(read.tokenizer, read.config.vocab_size)
        except ValueError as error:
            reason = str(error).replace("et export.gguf=[]", "et --to hf")
            raise UserError(f"{read.name} as GGUF: {reason}") from None


def left_out(read: Read, form: str) -> list[str]:
    """Published names of the tensors that the form has no place for, such as MTP modules."""
    slots = {name for name, slot in published_slots(read.config, read.selected.state).items() if not slot.shared}
    if form == "gguf":
        slots -= {name for names in published_in_gguf(read.config).values() for name in names}
    elif form == "hf":
        family = published_family(read.config)
        mtp = family is None or family.mtp
        slots -= published_slots(read.config, read.selected.state, mtp=mtp).keys()
    else:
        slots = set()
    return sorted(slots)


def write(read: Read, form: str, kind: Any, out: Path, licence: str) -> list[Check]:
    """Write aside, read back, compare, and put in place where all is well.

    Raises:
        StageFailed: what was written is not the model; nothing is left in `out`.
    """
    if form == "gguf":
        with atomic_path(out) as aside:
            written = save_gguf(
                aside, read.config, read.selected.state, kind=kind, tokenizer_folder=read.tokenizer, name=read.name,
                licence=licence, end_ids=read.ends,
            )  # fmt: skip
            return _checked(read, form, kind, aside, out, written.notes())
    save = save_hf if form == "hf" else save_native
    with atomic_folder(out) as aside:
        save(
            aside, read.config, read.selected.state, tokenizer_folder=read.tokenizer, model_card=_card(read, licence),
            dtype=getattr(torch, KINDS[kind].stored), generation=read.generation,
        )  # fmt: skip
        write_manifest(aside)  # without it nothing of ours reads the folder
        return _checked(read, form, kind, aside, out, [])


def _card(read: Read, licence: str) -> str:
    recipe: dict[str, float | str] = {"converted from": read.name}
    if started := (*read.selected.omitted, *read.selected.missing):
        recipe["tensors that start anew"] = str(len(started))
    return model_card(read.name, read.config, licence=licence, data={}, recipe=recipe, figures={}, baselines={})


def _checked(read: Read, form: str, kind: str, aside: Path, out: Path, notes: Sequence[str]) -> list[Check]:
    """Whether every weight came back, and what each program makes of them."""
    checks = []
    if kind in ("f32", "float32", "bfloat16"):  # the others round by more than a cast
        checks.append(_bits(read, form, kind, aside, out.name))
    checks += _programs(read, form, kind, aside, out.name, notes)
    failed = [f"{check.name}: {check.detail}" for check in checks if check.status == "failed"]
    if failed:
        raise StageFailed(f"what was written is not the model: {' | '.join(failed)}. Nothing was put into {out}.")
    return checks


def _bits(read: Read, form: str, kind: str, path: Path, name: str) -> Check:
    """Read back, every weight is the same bit for bit."""
    if form == "gguf":
        wanted, found = _held(read, form), read_gguf_file(path)[1].state
    else:
        dtype = getattr(torch, KINDS[kind].stored)
        wanted = {key: stored(key, value, dtype).float() for key, value in _held(read, form).items()}
        found = load_hf(path)[1]
    different = [key for key, value in wanted.items() if key not in found or not torch.equal(value, found[key])]
    detail = f"{len(different)} parameters differ, for example {different[0]}" if different else ""
    figures = {"equal_parameters": float(len(wanted) - len(different))}
    return Check(name, "failed" if different else "passed", figures, detail, "read back, bit for bit")


def _programs(read: Read, form: str, kind: str, path: Path, name: str, notes: Sequence[str]) -> list[Check]:
    """A check for each program that loads it; not run where there is no chat to compare."""
    try:
        tokenizer = load_tokenizer(read.tokenizer)
        tokenizer.encode_prompt(QUESTIONS[0])
    except UserError as error:
        return [Check(name, "not run", detail=f"its tokenizer asks no question: {error}", notes=tuple(notes))]
    context = read.config.max_position_embeddings
    questions = [q for q in QUESTIONS if len(tokenizer.encode_prompt(q)) + 8 < context]
    ends = [end for end in read.ends if end != tokenizer.eos_id]
    material = Material(tokenizer, questions, read.begins, frozenset(ends[:2] if form == "gguf" else ends))
    exported = native(kind) if form == "checkpoint" else KINDS[kind]
    model = Transformer(read.config)
    model.load_state_dict(read.selected.state)
    model.eval().requires_grad_(False)
    return check_export(Export(name, path, exported, model, material, notes=tuple(notes)))


def _held(read: Read, form: str) -> dict[str, Tensor]:
    """The parameters that the form holds."""
    slots, without = published_slots(read.config, read.selected.state), set(left_out(read, form))
    names = {slot.name for name, slot in slots.items() if not slot.shared and name in without}
    return {name: value for name, value in read.selected.state.items() if name not in names}

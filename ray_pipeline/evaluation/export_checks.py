"""Which programs load which export, and what they are held to: our model in fp32 with the weights that the file holds.

The file's weights are held against the trained ones, so that a wrong tensor is no rounding; what each program makes of
them against our model with these very weights, so that rounding excuses no program.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert.export_kinds import KINDS, ExportKind
from model.convert.gguf_read import read_gguf
from model.convert.hf_load import load_hf
from model.convert.onnx_file import read_onnx
from model.transformer import Transformer
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.llama_cpp import LlamaCpp, LlamaMissing
from ray_pipeline.evaluation.onnx_program import OnnxProgram
from ray_pipeline.evaluation.proof import Check, Material, Program, our_answers, prove
from ray_pipeline.evaluation.proof_programs import OurProgram, TransformersProgram
from ray_pipeline.evaluation.rounding_cost import RoundingCost

COSTLY = 0.01  # relative rounding from which perplexity and accuracy are measured


@dataclass(frozen=True)
class Export:
    """A file or folder as it is checked: before it is put in place.

    Attributes:
        name: what it will be called. path: where it is now.
        model: as it was trained, on the CPU in fp32. notes: what is in it otherwise than asked.
    """

    name: str
    path: Path
    kind: ExportKind
    model: Transformer
    material: Material
    cost: RoundingCost | None = None
    notes: tuple[str, ...] = ()


def check_export(export: Export) -> list[Check]:
    """A check for each program that can load it; what is not installed is "not run"."""
    try:
        held, error = _held_by(export)
    except (ValueError, UserError, RuntimeError) as unread:
        return [Check(export.name, "failed", detail=f"it cannot be read back: {unread}", program="ray-pipeline")]
    if error > export.kind.rounding:
        detail = f"a matrix is {error:.2%} off, over the {export.kind.rounding:.2%} of {export.kind.name}"
        return [Check(export.name, "failed", {"largest_weight_error": error}, detail, "ray-pipeline", export.notes)]
    answers = our_answers(held, export.material)
    checks = []
    for load in _programs(export):
        try:
            program = load()
        except LlamaMissing as missing:
            checks.append(Check(export.name, "not run", detail=str(missing), program="llama.cpp", notes=export.notes))
            continue
        except (RuntimeError, UserError, ValueError) as refused:
            checks.append(Check(export.name, "failed", detail=f"it does not load: {refused}", notes=export.notes))
            continue
        try:
            check = prove(program, answers, export.material, export.kind.tolerance)
            figures = check.figures | {"largest_weight_error": error}
            if not checks and export.cost is not None and export.kind.rounding >= COSTLY:
                figures |= export.cost.figures(program)
        finally:
            program.close()
        checks.append(replace(check, name=export.name, figures=figures, notes=export.notes if not checks else ()))
    return checks


def _programs(export: Export) -> list[Callable[[], Program]]:
    """What loads it, the one it is made for first."""
    path = export.path
    if export.kind.form == "gguf":
        return [lambda: _llama(export)]
    if export.kind.form == "onnx":
        return [lambda: OnnxProgram(path)]
    ours: Callable[[], Program] = lambda: OurProgram.of_folder(path)  # noqa: E731
    if export.kind.form == "native" or export.kind.name == "fp8":  # transformers reads FP8 blocks on GPUs alone
        return [ours]
    return [lambda: TransformersProgram(path), ours]


def not_asked() -> dict[str, str]:
    """Programs that read exports and are not installed here, for the card."""
    return {} if importlib.util.find_spec("vllm") else {"vllm": "not installed"}


def _llama(export: Export) -> LlamaCpp:
    config, tokenizer = export.model.config, export.material.tokenizer
    return LlamaCpp(
        export.path, context=config.max_position_embeddings, threads=torch.get_num_threads(),
        vocab_size=config.vocab_size, plain=tokenizer.encode("a")[0],
    )  # fmt: skip


def _held_by(export: Export) -> tuple[Transformer, float]:
    """The model with the weights of the file, and the largest error of a parameter relative to its root mean square.

    The architecture is the trained one's, not what the file says of it: a program that the file misleads must differ.
    """
    config, state = _read(export)
    model = export.model
    if export.kind.form == "native" and config != model.config:
        raise ValueError("config.json is of another architecture")
    ours = model.state_dict()
    error = max(_error(state[name], ours[name]) for name in state)
    held = Transformer(replace(model.config, num_nextn_predict_layers=config.num_nextn_predict_layers))
    held.load_state_dict(state)
    return held.eval(), error


def _read(export: Export) -> tuple[ModelConfig, dict[str, Tensor]]:
    if export.kind.form == "onnx":
        return replace(export.model.config, num_nextn_predict_layers=0), read_onnx(export.path)
    if export.kind.form != "gguf":
        return load_hf(export.path)
    config, selected = read_gguf(export.path)
    return config, selected.state


def _error(theirs: Tensor, ours: Tensor) -> float:
    if theirs.shape != ours.shape:
        raise ValueError(f"a tensor has shape {list(theirs.shape)}, not {list(ours.shape)}")
    return float((theirs - ours).norm() / ours.norm().clamp(min=1e-20))


def native(kind: str) -> ExportKind:
    """A kind of number, in a folder of our own format: nothing else reads it."""
    return replace(KINDS["float32"], form="native", stored=KINDS[kind].stored, rounding=KINDS[kind].rounding)

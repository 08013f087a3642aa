"""What serves a model: the interface of an engine, and the choice of one that can load it. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.model_source import ModelSource

if TYPE_CHECKING:
    from fastapi import FastAPI

    from model.config import ModelConfig


@dataclass(frozen=True)
class ServedModel:
    """A model as a user named it.

    Attributes:
        name: what clients call it.
        source: weights and tokenizer; None for a .gguf file from elsewhere.
        gguf: the .gguf file that was given, or that EXPORT wrote of these weights.
        config: of our architectures; None for others and for a .gguf file.
        bos: plain text begins with the start token.
    """

    name: str
    source: ModelSource | None
    gguf: Path | None
    config: ModelConfig | None
    bos: bool = False


@dataclass(frozen=True)
class EngineSettings:
    """How to serve.

    Attributes:
        slots: answers written at the same time. context: tokens of prompt and answer; None for the model's own.
        threads: None for all cores. speculative: tokens are drafted by the model's MTP module, and checked.
    """

    slots: int = 32
    context: int | None = None
    threads: int | None = None
    speculative: bool = False


@dataclass(frozen=True)
class RunningEngine:
    """An engine that has loaded its model.

    Attributes:
        app: what clients talk to. stop: ends it; may be called twice.
    """

    name: str
    app: FastAPI
    stop: Callable[[], None]


class Engine(Protocol):
    """One way to run a model."""

    name: str

    def missing(self) -> str | None:
        """What has to be installed before it serves anything, and how; None where nothing is missing."""
        ...

    def why_not(self, model: ServedModel) -> str | None:
        """Why it cannot serve the model, and what would help; None where it can. Loads nothing."""
        ...

    def start(self, model: ServedModel, settings: EngineSettings) -> RunningEngine:
        """Load the model.

        Raises:
            UserError: files that are damaged, or an engine that does not start.
        """
        ...


def known_engines() -> dict[str, Engine]:
    """By name."""
    from ray_pipeline.serving.llamacpp_engine import LlamaCppEngine
    from ray_pipeline.serving.native_engine import NativeEngine
    from ray_pipeline.serving.vllm_engine import VllmEngine

    engines: tuple[Engine, ...] = (LlamaCppEngine(), VllmEngine(), NativeEngine())
    return {engine.name: engine for engine in engines}


def preference(*, has_gpu: bool) -> tuple[str, ...]:
    """The order in which `auto` tries engines."""
    return ("vllm", "native", "llamacpp") if has_gpu else ("llamacpp", "native", "vllm")


def choose_engine(model: ServedModel, wanted: str, engines: Mapping[str, Engine], order: tuple[str, ...]) -> Engine:
    """The engine that was asked for, or the first that can.

    Raises:
        UserError: it cannot serve the model, or none can, with every engine's reason.
    """
    reasons = {name: engines[name].why_not(model) for name in order if name in engines}
    able = [name for name, reason in reasons.items() if reason is None]
    if wanted != "auto":
        if reasons[wanted] is None:
            return engines[wanted]
        way_out = f"Use --engine {able[0]}, which can." if able else _listed(reasons)
        raise UserError(f"--engine {wanted} cannot serve {model.name}: {reasons[wanted]}. {way_out}")
    if not able:
        raise UserError(f"no engine can serve {model.name}. {_listed(reasons)}")
    return engines[able[0]]


def _listed(reasons: Mapping[str, str | None]) -> str:
    return " ".join(f"{name}: {reason}." for name, reason in reasons.items())

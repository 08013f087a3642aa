"""How ranks are arranged, as it may be set. Never changes a result, so it is no part of a stage's identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ray_pipeline.settings.section import NonNegativeInt, Ranks, Rows, Seconds, Section

ZeroStage = Literal[0, 1, 2, 3]
Schedule = Literal["1f1b", "interleaved_1f1b", "zbv", "dualpipev"]


@dataclass(frozen=True)
class LayoutOptions:
    """What a layout has besides the sizes of its axes. `LayoutConfig` and `layout.layout.Layout` inherit it, so that an
    option is declared here and nowhere else."""

    zero_stage: ZeroStage = 0
    schedule: Annotated[
        Schedule,
        Field(description="order of work in the pipeline; all but 1f1b give each rank two parts of the model"),
    ] = "1f1b"
    pp_layout: Annotated[
        str | None, Field(description='layers of each part, "E+4|4|4+H"; default: balanced by cost')
    ] = None
    activation_checkpointing: Annotated[
        Literal["none", "selective", "full"], Field(description="what backward computes again instead of keeping it")
    ] = "none"
    offload_optimizer: Annotated[bool, Field(description="optimizer state in CPU memory, with zero_stage 2 or 3")] = (
        False
    )
    min_gpus: Annotated[
        Ranks | None,
        Field(description="elastic: go on with this many ranks when workers are lost; default: wait for all of them"),
    ] = None


class AxesConfig(Section):
    """Ranks along every axis of `model.parallel.grid.MeshSizes`."""

    pp_size: Ranks = 1
    dp_size: Ranks | None = Field(None, description="default: what the other axes leave of the ranks")
    tp_size: Ranks = 1
    ep_size: Ranks = 1
    sp_size: Ranks = 1


class TeacherLayoutConfig(AxesConfig):
    """The teacher's own arrangement of the run's ranks. Never changes a result."""


class LayoutConfig(AxesConfig, LayoutOptions):
    """The layout a user asks for. `layout.choice.resolve_layout` fills in the sizes that are left open."""

    gpus: Ranks | None = Field(None, description="ranks; default: every GPU there is, or one CPU rank")
    micro_batch: Rows = Field(8, description="rows per rank and forward pass")
    emulate_fp8: bool = Field(
        False, description="precision=fp8 on GPUs without its tensor cores: the same numbers by slow fp32 products"
    )
    check_memory: bool = Field(True, description="false: start a stage though `plan` says that it does not fit")
    sampling: Literal["auto", "whole", "sharded"] = Field(
        "auto",
        description="how training ranks write answers: each with a whole copy of the model, or together with the "
        "shards they train; auto: whole where `plan` says that it fits",
    )
    timeout_seconds: Seconds = Field(600.0, description="a collective that waits longer is an error")
    frozen_seconds: float = Field(
        40.0, ge=0, le=86400, description="a rank that gives no sign of life so long is named and ended; 0: never"
    )
    wait_for_nodes: float = Field(
        0.0, ge=0, le=86400, description="seconds that a cluster which grows on demand is given to hold the ranks"
    )
    max_restarts: NonNegativeInt = Field(2, description="times Ray Train restarts a stage's workers after one died")

    @field_validator("frozen_seconds")
    @classmethod
    def _longer_than_a_few_beats(cls, value: float) -> float:
        """Ranks give a sign of life every second, and a busy machine may be late with it."""
        if 0 < value < 10:
            raise ValueError("must be 0 (never) or at least 10, as a busy machine may keep a rank waiting for seconds")
        return value

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _none_is_a_name_here(cls, value: object) -> object:
        """Written as a flag or in the environment, `none` reads as null."""
        return "none" if value is None else value

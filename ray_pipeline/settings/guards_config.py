"""Settings of the guards that watch training. No part of a stage's identity: they act where something went wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ray_pipeline.settings.section import PositiveInt, Section

Policy = Literal["off", "warn", "rewind", "stop"]
# What is seen before the weights are moved, so that the step can be left out.
StepPolicy = Literal["off", "warn", "skip", "rewind", "stop"]


class GuardsConfig(Section):
    """What is done when training goes wrong.

    warn: told, and an alert. skip: the step is not taken. rewind: back to the newest checkpoint from before it began,
    and the batch is left out. stop: the stage ends, and says how to go on.
    """

    not_finite: Literal["skip", "rewind", "stop"] = Field("stop", description="loss or gradients are no numbers")
    loss_spike: StepPolicy = Field("warn", description="loss far above those of the last steps")
    exploding_gradients: StepPolicy = Field("warn", description="gradient norm far above those of the last steps")
    vanishing_gradients: Policy = Field("warn", description="gradient norm next to nothing beside what it was")
    dead_experts: Policy = Field("warn", description="experts that no token is sent to any more")
    entropy_collapse: Policy = Field("warn", description="the policy hardly varies its answers any more")
    frozen_reward: Policy = Field("warn", description="the mean reward stays exactly the same, step after step")
    longer_answers: Policy = Field("warn", description="answers grow and are right no more often")
    repetition: Policy = Field("warn", description="answers repeat themselves more and more")
    format_without_answers: Policy = Field("warn", description="the format is rewarded and kept, answers are wrong")
    window: Annotated[int, Field(ge=10, le=10**6)] = Field(50, description="steps that a step is held against")
    patience: PositiveInt = Field(5, description="times in a row that a slow fault is seen before it counts")
    spike: Annotated[float, Field(gt=1.0, le=1e6)] = Field(
        8.0, description="times the usual scatter of the loss that make a spike"
    )
    explosion: Annotated[float, Field(gt=1.0, le=1e9)] = Field(
        10.0, description="times the usual gradient norm that make an explosion"
    )
    max_rewinds: PositiveInt = Field(3, description="of one stage; one more stops it")

"""Answers of a model that may call tools. The turns themselves are `ray_pipeline.rollouts.agent`'s, as in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.models import LanguageModel, NativeBackend
from ray_pipeline.rollouts.agent import ToolTurns, answer_with_tools
from ray_pipeline.settings.post_training import ToolsConfig
from ray_pipeline.tools.known_tools import check_tool_names
from ray_pipeline.tools.toolbox import ToolBox, listed_tools

if TYPE_CHECKING:
    from ray_pipeline.evaluation.model_source import ModelSource
    from ray_pipeline.rollouts.rollout import Sampled


def check_tools(names: tuple[str, ...], sources: list[ModelSource], *, without_landlock: bool = False) -> None:
    """Refuse, before a model is loaded, tools that are not there and models that cannot call any.

    Raises:
        UserError: an unknown tool, a tokenizer without tokens for calls, or a model that transformers runs.
    """
    check_tool_names(names, without_landlock=without_landlock)
    for source in sources:
        if source.form == "transformers":
            raise UserError(
                f"--tools: {source.folder} is run by transformers, and tools are for models of our own decoder. Leave "
                "them out."
            )
        ToolTurns(source.read_tokenizer())


class ToolUser:
    """A model with tools at hand; used as a context."""

    def __init__(self, model: LanguageModel, settings: ToolsConfig):
        self.model, self.settings = model, settings
        self.toolbox, self.listed = ToolBox(settings), listed_tools(settings)

    def __enter__(self) -> ToolUser:
        return self

    def __exit__(self, *exc: object) -> None:
        self.toolbox.close()

    def prompt(self, question: str) -> list[int]:
        """Ids of a question, with the tools described in it where they are to be listed."""
        return self.model.tokenizer.encode_prompt(question, self.listed)

    def write(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seeds: list[int]
    ) -> list[Sampled]:
        """Continue every prompt, calls and what the tools say included."""
        backend = self.model.backend
        assert isinstance(backend, NativeBackend), "checked before the model was loaded"
        return answer_with_tools(
            backend.decoder, self.model.tokenizer, prompts, self.toolbox, max_new_tokens=max_new_tokens,
            max_calls=self.settings.max_calls, temperature=temperature, seeds=seeds, max_batch=max(1, len(prompts)),
        )  # fmt: skip

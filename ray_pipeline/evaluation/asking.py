"""Asks a model many questions, several times each, and notes how it answered. Marks nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from model.generate.decode import Completion, ToolUse
from ray_pipeline.data.tasks.question import THINK_CLOSE, THINK_OPEN
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.marking import is_well_formed
from ray_pipeline.evaluation.model_source import ModelSource
from ray_pipeline.evaluation.models import DecoderBackend, LanguageModel
from ray_pipeline.evaluation.results import Sample
from ray_pipeline.evaluation.self_check import self_check
from ray_pipeline.evaluation.tasks.item import Item
from ray_pipeline.rollouts.agent import ToolTurns, answer_with_tools
from ray_pipeline.rollouts.rollout import request_seed
from ray_pipeline.settings.post_training import ToolsConfig
from ray_pipeline.tools.known_tools import check_tool_names
from ray_pipeline.tools.toolbox import ToolBox, listed_tools

# Told after every batch: answers and tokens written since the last time.
Watch = Callable[[int, int], None]
NOTHING = Sample("", finished=False, fits=False)  # to a prompt that fills the context


@dataclass(frozen=True)
class AskSettings:
    """How a model is asked.

    Attributes:
        samples: answers to each question. temperature: 0 is greedy.
        max_new_tokens: of one answer. max_batch: answers written together.
        tools: what the model may call while it answers.
    """

    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 512
    seed: int = 0
    max_batch: int = 256
    tools: ToolsConfig = field(default_factory=ToolsConfig)


def check_tools(names: tuple[str, ...], sources: list[ModelSource], *, without_landlock: bool = False) -> None:
    """Refuse, before a model is loaded, tools that are not there and models that cannot call any.

    Raises:
        UserError: an unknown tool, a tokenizer without tokens for calls, or a model that transformers runs.
    """
    check_tool_names(names, without_landlock=without_landlock)
    for source in sources:
        if source.form == "transformers":
            raise UserError(
                f"--tools: {source.folder} is run by transformers, and tools are for models of our own decoder. Omit "
                "--tools."
            )
        ToolTurns(source.read_tokenizer())


def ask(
    model: LanguageModel, items: Sequence[Item], settings: AskSettings, watch: Watch = lambda *_: None
) -> list[list[Sample]]:
    """For each question its answers, unmarked. Equal settings give equal answers, whatever else is asked."""
    listed = listed_tools(settings.tools)
    prompts = [model.prompt(item.prompt, listed) for item in items]
    samples: list[list[Sample]] = [[NOTHING] * settings.samples for _ in items]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < model.backend.context]
    requests = [(i, k) for i in sorted(fitting, key=lambda i: len(prompts[i])) for k in range(settings.samples)]
    if len(fitting) < len(items):
        watch((len(items) - len(fitting)) * settings.samples, 0)
    waves = -(-len(requests) // settings.max_batch)
    with ExitStack() as stack:
        toolbox = stack.enter_context(ToolBox(settings.tools)) if settings.tools.names else None
        for wave in range(waves):
            # Waves of equal size, as `generate` makes them: a small last one would cost as many steps as a full one.
            batch = requests[wave * len(requests) // waves : (wave + 1) * len(requests) // waves]
            # An answer's draws do not depend on the other questions.
            seeds = [request_seed(settings.seed, items[i].id, k) for i, k in batch]
            completions = _complete(model, toolbox, [prompts[i] for i, _ in batch], seeds, settings)
            for (i, k), completion in zip(batch, completions, strict=True):
                samples[i][k] = sample_of(model, completion)
            watch(len(batch), sum(len(completion.tokens) for completion in completions))
    return samples


def _complete(
    model: LanguageModel, toolbox: ToolBox | None, prompts: list[list[int]], seeds: list[int], settings: AskSettings
) -> list[Completion]:
    """Continue every prompt, with calls of tools and what they say where there are any."""
    limit, temperature, backend = settings.max_new_tokens, settings.temperature, model.backend
    if toolbox is None:
        return backend.generate(
            prompts, max_new_tokens=limit, temperature=temperature, seeds=seeds, eos_ids=model.eos_ids
        )
    assert isinstance(backend, DecoderBackend), "checked before the model was loaded"
    return answer_with_tools(
        backend.decoder, model.tokenizer, prompts, toolbox, max_new_tokens=limit,
        max_calls=settings.tools.max_calls, temperature=temperature, seeds=seeds, max_batch=max(1, len(prompts)),
    )  # fmt: skip


def sample_of(model: LanguageModel, completion: Completion) -> Sample:
    """A completion's text and counts, without a mark."""
    prompt, tokens, use = completion.prompt, completion.tokens, completion.tools or ToolUse()
    text = model.text(prompt, tokens)
    check = self_check(text)
    opening, closing = model.tokenizer.encode(THINK_OPEN), model.tokenizer.encode(THINK_CLOSE)
    own = tokens[:-1] if tokens and tokens[-1] in model.eos_ids else tokens
    thinking, answer = count_thinking(own, opening, closing, inside=model.opens_thinking(prompt))
    return Sample(
        text,
        well_formed=is_well_formed(text),
        finished=completion.finished,
        tokens=len(tokens),
        thinking_tokens=thinking,
        answer_tokens=answer,
        steps=check.steps,
        steps_right=check.right,
        recomputes=check.recomputes,
        reflects=check.reflects,
        tool_calls=use.calls,
        valid_tool_calls=use.valid,
    )


def count_thinking(
    tokens: Sequence[int], opening: Sequence[int], closing: Sequence[int], *, inside: bool
) -> tuple[int, int]:
    """Tokens between the marks, and tokens outside of them; the marks themselves are neither.

    Thinking that never ends takes all that are left; a mark out of place counts as what it stands in.

    Args:
        opening, closing: ids of `<think>` and `</think>`. inside: the prompt already opened the thinking.
    """
    counts, at = [0, 0], 0
    while at < len(tokens):
        mark = closing if inside else opening
        if list(tokens[at : at + len(mark)]) == list(mark):
            inside, at = not inside, at + len(mark)
        else:
            counts[inside] += 1
            at += 1
    return counts[1], counts[0]

"""Asks a model many questions, several times each, and keeps what it answered. Marks nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ray_pipeline.data.tasks.question import THINK_CLOSE, THINK_OPEN
from ray_pipeline.evaluation.models import LanguageModel
from ray_pipeline.evaluation.tasks.item import Item
from ray_pipeline.settings.post_training import ToolsConfig

if TYPE_CHECKING:
    from ray_pipeline.evaluation.tool_rounds import ToolUser

# Told after every batch: answers and tokens written since the last time.
Watch = Callable[[int, int], None]


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


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: without the end token. tokens: how many, the end token included.
        thinking_tokens: those between `<think>` and `</think>`; answer_tokens: those outside, marks left out.
        fits: the prompt left room in the context.
        tool_calls: calls that were made, and how many of them were well formed.
    """

    text: str
    tokens: int
    thinking_tokens: int
    answer_tokens: int
    finished: bool
    fits: bool = True
    tool_calls: tuple[int, int] = (0, 0)


NOTHING = Reply("", 0, 0, 0, finished=False, fits=False)


def sample_seed(seed: int, item: str, sample: int) -> int:
    """A 63-bit seed of its own for every answer, which does not depend on the other questions."""
    digest = hashlib.sha256(f"{seed}/{item}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


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


def ask(model: LanguageModel, items: Sequence[Item], settings: AskSettings, watch: Watch) -> list[list[Reply]]:
    """For each question its answers. Equal settings give equal answers, whatever else is asked."""
    if settings.tools.names:
        from ray_pipeline.evaluation.tool_rounds import ToolUser

        with ToolUser(model, settings.tools) as user:
            return _ask(model, user, items, settings, watch)
    return _ask(model, None, items, settings, watch)


def _ask(
    model: LanguageModel, user: ToolUser | None, items: Sequence[Item], settings: AskSettings, watch: Watch
) -> list[list[Reply]]:
    prompts = [(user or model).prompt(item.prompt) for item in items]
    replies: list[list[Reply]] = [[NOTHING] * settings.samples for _ in items]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < model.backend.context]
    requests = [(i, k) for i in sorted(fitting, key=lambda i: len(prompts[i])) for k in range(settings.samples)]
    if len(fitting) < len(items):
        watch((len(items) - len(fitting)) * settings.samples, 0)
    waves = -(-len(requests) // settings.max_batch)
    for wave in range(waves):
        # Waves of equal size, as `generate` makes them: a small last one would cost as many steps as a full one.
        batch = requests[wave * len(requests) // waves : (wave + 1) * len(requests) // waves]
        seeds = [sample_seed(settings.seed, items[i].id, k) for i, k in batch]
        found = _write(model, user, [prompts[i] for i, _ in batch], seeds, settings)
        for (i, k), reply in zip(batch, found, strict=True):
            replies[i][k] = reply
        watch(len(batch), sum(reply.tokens for reply in found))
    return replies


def _write(
    model: LanguageModel, user: ToolUser | None, prompts: list[list[int]], seeds: list[int], settings: AskSettings
) -> list[Reply]:
    limit, temperature = settings.max_new_tokens, settings.temperature
    if user is None:
        written = model.backend.generate(
            prompts, max_new_tokens=limit, temperature=temperature, seeds=seeds, eos_ids=model.eos_ids
        )
        pairs = zip(prompts, written, strict=True)
        return [reply_of(model, prompt, answer.tokens, finished=answer.finished) for prompt, answer in pairs]
    sampled = user.write(prompts, max_new_tokens=limit, temperature=temperature, seeds=seeds)
    return [
        replace(
            reply_of(model, prompt, answer.tokens, finished=answer.finished),
            tool_calls=(answer.tools.calls, answer.tools.valid) if answer.tools else (0, 0),
        )
        for prompt, answer in zip(prompts, sampled, strict=True)
    ]


def reply_of(model: LanguageModel, prompt: list[int], tokens: list[int], *, finished: bool) -> Reply:
    """An answer's text and counts."""
    text = model.text(prompt, tokens)
    opening, closing = model.tokenizer.encode(THINK_OPEN), model.tokenizer.encode(THINK_CLOSE)
    own = tokens[:-1] if tokens and tokens[-1] in model.eos_ids else tokens
    thinking, answer = count_thinking(own, opening, closing, inside=model.opens_thinking(prompt))
    return Reply(text, len(tokens), thinking, answer, finished)

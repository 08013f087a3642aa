"""An iteration's groups of marked answers: ask, sample, mark, and ask anew where all answers score alike.

Knows the rollout engine and the rewards, and no model in training. Everything is a function of (weights, seed,
iteration, place in the order of prompts).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from model.generate.decode import Completion, ToolUse
from ray_pipeline.data.chat.completion_text import PromptTokenizer, completion_text
from ray_pipeline.rewards.scoring import Scores
from ray_pipeline.rollouts.advantages import overlong_penalty
from ray_pipeline.rollouts.rollout import Marked, SampleRequest, request_seed
from ray_pipeline.rollouts.samplers import RolloutEngine
from ray_pipeline.settings.schema import GrpoConfig

Group = list[Marked]

Score = Callable[[Sequence[tuple[str, str, str]]], Scores]
"""[(prompt, completion, reference)] -> their marks; the same on every rank."""


@dataclass(frozen=True)
class Question:
    """A question as text, with its reference answer, and as the prompt's token ids."""

    text: str
    answer: str
    prompt: list[int]


@dataclass
class Pending:
    """Questions on their way through the engine.

    Attributes:
        place: of the first in the order of prompts. first: its number in the iteration. chosen: their indices in the
            data. handle: what the engine gives the completions for.
    """

    iteration: int
    place: int
    first: int
    chosen: list[int]
    handle: Any


@dataclass
class Collected:
    """The rollouts of an iteration.

    Attributes:
        groups: those that are worth training on and those that are not, in the order they were asked.
        place: of the next prompt in the order.
        drawn: groups sampled, those that were replaced included. alike: those of them whose answers score alike.
        failures: failed rewards by name. seconds: waiting for samples, and for marks.
    """

    iteration: int
    groups: list[Group]
    place: int
    drawn: int = 0
    alike: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "scoring": 0.0})

    def plain(self) -> dict[str, Any]:
        """As lists, numbers and tensors, which `torch.load` reads without running anything."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Collected:
        """Inverse of `plain`."""
        groups = [[_marked(values) for values in group] for group in plain["groups"]]
        return cls(**(plain | {"groups": groups}))


def _marked(values: dict[str, Any]) -> Marked:
    completion = Completion(**values["completion"])
    if completion.tools is not None:
        completion.tools = ToolUse(**values["completion"]["tools"])
    return Marked(**(values | {"completion": completion}))


def is_informative(group: Group) -> bool:
    """Whether its answers differ in reward, so that there is something to learn from."""
    return len({marked.reward for marked in group if not marked.failed}) > 1


class Collector:
    """Asks `settings.prompts_per_step` questions an iteration, `group_size` times each.

    Args:
        phase: is told what goes on, "sampling" or "scoring".
    """

    def __init__(
        self,
        settings: GrpoConfig,
        seed: int,
        questions: Sequence[Question],
        engine: RolloutEngine,
        score: Score,
        tokenizer: PromptTokenizer,
        phase: Callable[[str], None] = lambda name: None,
    ):
        self.phase = phase
        self.settings, self.seed, self.questions = settings, seed, questions
        self.engine, self.score, self.tokenizer = engine, score, tokenizer
        self.order = PromptOrder(len(questions), seed)

    def ask(self, iteration: int, place: int) -> Pending:
        """Begin an iteration: its first prompt is at `place` of the order."""
        return self._ask(iteration, place, 0, self.settings.prompts_per_step)

    def _ask(self, iteration: int, place: int, first: int, count: int) -> Pending:
        chosen = self.order.at(place, count)
        requests = [
            SampleRequest(self.questions[question].prompt, request_seed(self.seed, iteration, number, sample))
            for number, question in enumerate(chosen, start=first)
            for sample in range(self.settings.group_size)
        ]
        return Pending(iteration, place, first, chosen, self.engine.submit(requests))

    def collect(self, pending: Pending) -> Collected:
        """Wait for the answers and mark them; ask further questions in the place of groups that teach nothing (dynamic
        sampling, DAPO, arXiv:2503.14476, §3.2), at most `resample_rounds` times.

        Raises:
            UserError: more rewards failed than `scoring.max_failures`.
        """
        out = Collected(pending.iteration, [], pending.place)
        for left in range(self.settings.resample_rounds, -1, -1):
            fresh = self._mark(pending, out)
            out.groups = [group for group in out.groups if is_informative(group)] + fresh
            out.place = pending.place + len(pending.chosen)
            out.drawn += len(fresh)
            useless = sum(not is_informative(group) for group in fresh)
            out.alike += useless
            if not useless or not left:
                break
            pending = self._ask(pending.iteration, out.place, pending.first + len(pending.chosen), useless)
        return out

    def _mark(self, pending: Pending, out: Collected) -> list[Group]:
        """Wait for the completions; groups of them with their rewards."""
        settings, started = self.settings, time.monotonic()
        self.phase("sampling")
        completions = self.engine.collect(pending.handle)
        sampled = time.monotonic()
        self.phase("scoring")
        questions = [self.questions[i] for i in pending.chosen for _ in range(settings.group_size)]
        eos_ids = (self.tokenizer.eos_id,)
        texts = [completion_text(self.tokenizer, c.prompt, c.tokens, eos_ids) for c in completions]
        scores = self.score([(q.text, text, q.answer) for q, text in zip(questions, texts, strict=True)])
        for name, count in scores.failures.items():
            out.failures[name] = out.failures.get(name, 0) + count
        penalties = overlong_penalty(
            [len(c.tokens) for c in completions], settings.max_new_tokens, settings.overlong_buffer,
            settings.overlong_penalty,
        ).tolist()  # fmt: skip
        marked = [
            Marked(
                completion, scores.rewards[i] + penalties[i], scores.parts[i], pending.first + i // settings.group_size,
                scores.failed[i], texts[i],
            )
            for i, completion in enumerate(completions)
        ]  # fmt: skip
        out.seconds["sampling"] += sampled - started
        out.seconds["scoring"] += time.monotonic() - sampled
        return [marked[i : i + settings.group_size] for i in range(0, len(marked), settings.group_size)]


class PromptOrder:
    """Which questions are asked when: an epoch asks each once, in a seeded order, and places go on over epochs.

    A pure function of its arguments.

    Raises:
        ValueError: without a question.
    """

    def __init__(self, questions: int, seed: int):
        if questions < 1:
            raise ValueError(f"{questions} questions: there must be one at least")
        self.questions, self.seed = questions, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)  # torch takes no more
        return torch.randperm(self.questions, generator=generator).tolist()

    def at(self, place: int, count: int) -> list[int]:
        """Indices of the questions at places `place` to `place + count`."""
        return [self._epoch(p // self.questions)[p % self.questions] for p in range(place, place + count)]

"""An iteration's groups of marked answers: ask, sample, mark, and ask anew where all answers score alike.

Knows the rollout engine and the rewards, and no model in training. Everything is a function of (weights, seed,
iteration, place in the order of prompts).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ray_pipeline.data.chat.completion_text import PromptTokenizer, completion_text
from ray_pipeline.rewards.scoring import Scores
from ray_pipeline.rollouts.advantages import overlong_penalty
from ray_pipeline.rollouts.prompt_order import PromptOrder
from ray_pipeline.rollouts.rollout import Rollout, Sampled, SampleRequest, ToolUse, request_seed
from ray_pipeline.rollouts.samplers import RolloutEngine
from ray_pipeline.settings.schema import GrpoConfig

Group = list[Rollout]


Score = Callable[[Sequence[tuple[str, str, str]]], Scores]
"""[(prompt, completion, reference)] -> their marks; the same on every rank."""


@dataclass(frozen=True)
class Question:
    """A question as text, with its reference answer, and as the prompt's token ids."""

    text: str
    answer: str
    prompt: list[int]


@dataclass
class Asked:
    """Questions on their way through the engine: their numbers in the iteration, from `first` on, and in the data."""

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
        groups = [[_rollout(values) for values in group] for group in plain["groups"]]
        return cls(**(plain | {"groups": groups}))


def _rollout(values: dict[str, Any]) -> Rollout:
    tools = values["tools"]
    return Rollout(**(values | {"tools": None if tools is None else ToolUse(**tools)}))


def is_informative(group: Group) -> bool:
    """Whether its answers differ in reward, so that there is something to learn from."""
    return len({rollout.reward for rollout in group if not rollout.failed}) > 1


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

    def ask(self, iteration: int, place: int) -> Asked:
        """Begin an iteration: its first prompt is at `place` of the order."""
        return self._ask(iteration, place, 0, self.settings.prompts_per_step)

    def _ask(self, iteration: int, place: int, first: int, count: int) -> Asked:
        chosen = self.order.at(place, count)
        requests = [
            SampleRequest(self.questions[question].prompt, request_seed(self.seed, iteration, number, sample))
            for number, question in enumerate(chosen, start=first)
            for sample in range(self.settings.group_size)
        ]
        return Asked(iteration, place, first, chosen, self.engine.submit(requests))

    def collect(self, asked: Asked) -> Collected:
        """Wait for the answers and mark them; ask further questions in the place of groups that teach nothing (dynamic
        sampling, DAPO, arXiv:2503.14476, §3.2), at most `resample_rounds` times.

        Raises:
            UserError: more rewards failed than `scoring.max_failures`.
        """
        out = Collected(asked.iteration, [], asked.place)
        for left in range(self.settings.resample_rounds, -1, -1):
            fresh = self._marked(asked, out)
            out.groups = [group for group in out.groups if is_informative(group)] + fresh
            out.place = asked.place + len(asked.chosen)
            out.drawn += len(fresh)
            useless = sum(not is_informative(group) for group in fresh)
            out.alike += useless
            if not useless or not left:
                break
            asked = self._ask(asked.iteration, out.place, asked.first + len(asked.chosen), useless)
        return out

    def _marked(self, asked: Asked, out: Collected) -> list[Group]:
        settings, started = self.settings, time.monotonic()
        self.phase("sampling")
        answers = self.engine.collect(asked.handle)
        sampled = time.monotonic()
        self.phase("scoring")
        questions = [self.questions[i] for i in asked.chosen for _ in range(settings.group_size)]
        eos_ids, pairs = (self.tokenizer.eos_id,), zip(questions, answers, strict=True)
        texts = [completion_text(self.tokenizer, question.prompt, answer.tokens, eos_ids) for question, answer in pairs]
        scores = self.score([(q.text, text, q.answer) for q, text in zip(questions, texts, strict=True)])
        for name, count in scores.failures.items():
            out.failures[name] = out.failures.get(name, 0) + count
        penalties = overlong_penalty(
            [len(answer.tokens) for answer in answers], settings.max_new_tokens, settings.overlong_buffer,
            settings.overlong_penalty,
        )  # fmt: skip
        rollouts = [
            self._rollout(asked.first + i // settings.group_size, questions[i], answers[i], scores, i, penalties)
            for i in range(len(answers))
        ]
        out.seconds["sampling"] += sampled - started
        out.seconds["scoring"] += time.monotonic() - sampled
        return [rollouts[i : i + settings.group_size] for i in range(0, len(rollouts), settings.group_size)]

    def _rollout(
        self, number: int, question: Question, answer: Sampled, scores: Scores, i: int, penalties: Tensor
    ) -> Rollout:
        return Rollout(
            prompt_ids=question.prompt,
            completion_ids=answer.tokens,
            logprobs=answer.logprobs,
            reward=scores.rewards[i] + float(penalties[i]),
            parts=scores.parts[i],
            question_index=number,
            finished=answer.finished,
            forced=answer.forced,
            routing=answer.routing,
            tools=answer.tools,
            failed=scores.failed[i],
        )

"""Marked answers as data, and the figures that follow from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_pipeline.evaluation.marking import vote
from ray_pipeline.evaluation.statistics import majority, pass_at_k, wilson_interval


def question_digest(prompt: str, reference: str) -> str:
    """The same for the same question with the same right answer, in whichever run it is asked."""
    return hashlib.sha256(json.dumps([prompt, reference]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sample:
    """One completion with its mark, as reports keep it.

    Attributes:
        completion: its text, without the end token.
        score: 0 to 1; None where the marking failed, which counts as wrong. correct: the score is 1.
        well_formed: one block of thinking, then an answer. finished: ended by itself. fits: the prompt left room.
        tokens: all of them, end token included; thinking_tokens: those between `<think>` and `</think>`;
            answer_tokens: those outside, the marks left out.
        steps, steps_right, recomputes, reflects: see `self_check.SelfCheck`.
        tool_calls, valid_tool_calls: where tools were given.
    """

    completion: str
    correct: bool = False
    score: float | None = None
    well_formed: bool = False
    finished: bool = True
    fits: bool = True
    tokens: int = 0
    thinking_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    steps_right: int = 0
    recomputes: bool = False
    reflects: bool = False
    tool_calls: int = 0
    valid_tool_calls: int = 0


@dataclass(frozen=True)
class ItemResult:
    """A question with its marked answers."""

    id: str
    prompt: str
    reference: str
    category: str
    difficulty: int
    answers: list[Sample]

    @property
    def share(self) -> float:
        """Share of the answers that are right."""
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    def pass_at(self, k: int) -> float:
        """Chance that one of k answers is right."""
        return pass_at_k(len(self.answers), sum(answer.correct for answer in self.answers), k)

    def majority_right(self, k: int) -> bool:
        """Whether what most of the first k answers say is right."""
        chosen = majority([vote(answer.completion, self.reference) for answer in self.answers[:k]])
        return chosen is not None and self.answers[chosen].correct


@dataclass
class TaskResult:
    """A task's marked answers.

    Attributes:
        way, votes: as of the `Task`. seconds: the model's own time, marking left out.
        ks: the k of pass@k and maj@k.
        other: figures that do not come from the items (a harness's own).
    """

    name: str
    way: str
    items: list[ItemResult]
    seconds: float
    ks: tuple[int, ...] = (1,)
    votes: bool = True
    other: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Everything a report shows, as plain values. Rates that mean nothing for this task are absent."""
        out: dict[str, Any] = {"questions": len(self.items), **accuracy_of(self.items)}
        if not self.items:
            return out | {"other": self.other}
        answers = [answer for item in self.items for answer in item.answers]
        out["by_category"] = _grouped(self.items, "category")
        out["by_difficulty"] = _grouped(self.items, "difficulty")
        out["unmarked"] = sum(answer.score is None for answer in answers)
        scores = [answer.score or 0.0 for answer in answers]
        out["mean_score"] = sum(scores) / len(scores)
        if self.way == "answers":
            out |= self._sampled() | writing_figures(answers, self.seconds)
            out["too_long"] = sum(not item.answers[0].fits for item in self.items)
        return out | {"seconds": self.seconds, "other": self.other}

    def _sampled(self) -> dict[str, Any]:
        samples = len(self.items[0].answers)
        out: dict[str, Any] = {"samples": samples}
        out["pass_at_k"] = {str(k): _with_interval([item.pass_at(k) for item in self.items]) for k in self.ks}
        if self.votes and samples > 1:
            out["maj_at_k"] = {
                str(k): _with_interval([float(item.majority_right(k)) for item in self.items]) for k in self.ks
            }
        return out

    def as_json(self) -> dict[str, Any]:
        """Figures and all answers."""
        return {
            "task": self.name,
            "way": self.way,
            "votes": self.votes,
            "seconds": self.seconds,
            "figures": self.figures(),
            "items": [asdict(item) for item in self.items],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskResult:
        """What `as_json` gave.

        Raises:
            KeyError, TypeError: it is not of that form.
        """
        items = [
            ItemResult(**{**item, "answers": [Sample(**answer) for answer in item["answers"]]})
            for item in values["items"]
        ]
        figures = values["figures"]
        ks = tuple(int(k) for k in figures.get("pass_at_k", {"1": None}))
        return cls(values["task"], values["way"], items, values["seconds"], ks, values["votes"], figures["other"])


def _with_interval(values: Sequence[float]) -> dict[str, Any]:
    return {"value": sum(values) / len(values), "interval": list(wilson_interval(sum(values), len(values)))}


def accuracy_of(items: Sequence[ItemResult]) -> dict[str, Any]:
    """Mean share of right answers with its 95% Wilson interval over questions."""
    shares = [item.share for item in items]
    accuracy = sum(shares) / len(shares) if shares else 0.0
    return {"accuracy": accuracy, "interval": list(wilson_interval(sum(shares), len(shares)))}


def _grouped(items: Sequence[ItemResult], key: str) -> dict[str, Any]:
    values = sorted({getattr(item, key) for item in items})
    groups = {str(value): [item for item in items if getattr(item, key) == value] for value in values}
    return {value: {"questions": len(group), **accuracy_of(group)} for value, group in groups.items()}


def writing_figures(answers: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """How the answers are written.

    `thinking_overhead` is thinking tokens per answer token, over all answers; None where none was answered.
    `verified_rate`: answers whose working holds and gives their final result; `steps_right_rate`: whose working holds;
    `steps_rate`: with any arithmetic statement; `reflection_rate`: with a phrase of doubt or checking.
    """
    count, tokens = len(answers), sum(a.tokens for a in answers)
    thinking, outside = (sum(getattr(a, f"{part}_tokens") for a in answers) for part in ("thinking", "answer"))
    holding = [a for a in answers if 0 < a.steps == a.steps_right]
    out: dict[str, Any] = {
        "format_rate": sum(a.well_formed for a in answers) / count,
        "finished_rate": sum(a.finished for a in answers) / count,
        "mean_tokens": tokens / count,
        "mean_thinking_tokens": thinking / count,
        "thinking_overhead": thinking / outside if outside else None,
        "steps_rate": sum(a.steps > 0 for a in answers) / count,
        "steps_right_rate": len(holding) / count,
        "verified_rate": sum(a.recomputes for a in holding) / count,
        "reflection_rate": sum(a.reflects for a in answers) / count,
        "tokens_per_second": tokens / seconds if seconds else None,
    }
    calls = sum(a.tool_calls for a in answers)
    if calls:
        out["tool_calls"] = calls
        out["valid_tool_call_rate"] = sum(a.valid_tool_calls for a in answers) / calls
    return out

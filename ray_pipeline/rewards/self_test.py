"""Before training: do the rewards know a right answer from a wrong one, in the form a model would write it?

Reference answers are rendered through the chat template, encoded, and decoded as a sampled completion is. So a template
that drops the thinking, a tokenizer that does not give text back, and references that a reward cannot read all show
here, and not as a reward of 0 for everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray_pipeline.data.chat.completion_text import completion_text
from ray_pipeline.data.forms.question_records import split_answer
from ray_pipeline.data.tasks.question import THINK_CLOSE, think
from ray_pipeline.errors import UserError
from ray_pipeline.reasoning import parse
from ray_pipeline.rewards.answer import extract, parse_number
from ray_pipeline.rewards.registry import RewardEntry
from ray_pipeline.rewards.scoring import Scorer
from ray_pipeline.settings.post_training import ScoringConfig

SAMPLE = 6
"""Questions looked at: what fails here fails for all of a kind, and a sandbox takes its time for each."""

_TOLERANCE = 1e-6
Question = Mapping[str, Any]


class ChatEncoder(Protocol):
    """What is needed of a tokenizer; `ray_pipeline.data.chat.tokenizer.ChatTokenizer` is one."""

    eos_id: int

    def encode_chat(self, messages: Any, tools: Any = (), /) -> tuple[list[int], list[int]]: ...

    def decode(self, ids: list[int], /) -> str: ...


@dataclass(frozen=True)
class _Case:
    """A question with a right answer and, where there are others to take one from, a wrong one."""

    question: Question
    right: str
    wrong: str | None

    def item(self, completion: str) -> tuple[str, str, str]:
        return self.question["prompt"], completion, str(self.question["answer"])


def check_rewards(
    weights: Mapping[str, float],
    questions: Sequence[Question],
    tokenizer: ChatEncoder,
    settings: ScoringConfig | None = None,
) -> dict[str, int]:
    """Right answers score full and wrong ones 0, for rewards that judge; no reward fails.

    Any other must score right answers no less than wrong ones, in the mean, where its weight is positive.

    Args:
        questions: {"prompt", "answer"} and, where the answer alone cannot be written as a completion (unit tests),
            "completion"; "tools" if there are any. A few with different answers are taken from all over.
    Returns:
        By reward, how many right answers were tried: 0 where none can be written from the references.
    Raises:
        UserError: naming the reward, the question, and what was scored otherwise.
    """
    limits = (settings or ScoringConfig()).model_copy(update={"max_failures": 0.0})
    tried = {}
    for name, weight in weights.items():
        with Scorer({name: weight}, limits) as scorer:
            tried[name] = _check(scorer, name, questions, tokenizer)
    return tried


def _check(scorer: Scorer, name: str, questions: Sequence[Question], tokenizer: ChatEncoder) -> int:
    entry = scorer.entries[name]
    cases = _cases(entry, questions, tokenizer)
    right = _values(scorer, name, [case.item(case.right) for case in cases])
    with_wrong = [(case, case.wrong) for case in cases if case.wrong is not None]
    wrong = _values(scorer, name, [case.item(text) for case, text in with_wrong])
    if entry.full is not None:
        for case, value in zip(cases, right, strict=True):
            if abs(value - entry.full) > _TOLERANCE:
                raise UserError(_otherwise(name, case.question, "right", case.right, value, entry.full))
    if entry.judges:
        for (case, text), value in zip(with_wrong, wrong, strict=True):
            if abs(value) > _TOLERANCE:
                raise UserError(_otherwise(name, case.question, "wrong", text, value, 0.0))
    elif wrong and scorer.weights[name] > 0 and _mean(right) < _mean(wrong) - _TOLERANCE:
        raise UserError(
            f'self-test of the reward "{name}": right answers score less ({_mean(right):.4g}) than wrong ones '
            f"({_mean(wrong):.4g}) in the mean of {len(wrong)} questions, so training would unlearn them. "
            "Fix the function, or give it a negative weight if it is a penalty."
        )
    return len(cases)


def _values(scorer: Scorer, name: str, items: Sequence[tuple[str, str, str]]) -> list[float]:
    return [parts[name] for parts in scorer.score(items).parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _otherwise(name: str, question: Question, kind: str, text: str, value: float, expected: float) -> str:
    return (
        f'self-test of the reward "{name}": to the question {_short(question["prompt"])!r} the {kind} answer '
        f"{_short(text)!r} scored {value:g} and not {expected:g}; the reference is {_short(question['answer'])!r}. "
        "Training on it would go wrong. Fix the references or the chat template, or choose another reward."
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


def _cases(entry: RewardEntry, questions: Sequence[Question], tokenizer: ChatEncoder) -> list[_Case]:
    """Some questions with different answers; each one's wrong answer is the next one's right one."""
    found: dict[Any, tuple[Question, str]] = {}
    for question in questions[:: max(1, len(questions) // (4 * SAMPLE))]:
        text = _completion(entry, question)
        if text is not None and len(found) < SAMPLE:
            found.setdefault(_meaning(text), (question, text))
    kept = list(found.values())
    texts = [as_sampled(question, text, tokenizer) for question, text in kept]
    others = [*texts[1:], texts[0]] if len(texts) > 1 else [None] * len(texts)
    return [_Case(question, text, other) for (question, _), text, other in zip(kept, texts, others, strict=True)]


def _completion(entry: RewardEntry, question: Question) -> str | None:
    """A right answer as the assistant would write it, with a thinking block; None where none can be written."""
    text = question.get("completion")
    if text is None:
        text = (entry.demonstrate or _worked)(str(question["answer"]))
    return text if text is None or THINK_CLOSE in text else think("", text)


def _worked(reference: str) -> str:
    steps, final = split_answer(reference)
    return think(steps, final)


def _meaning(completion: str) -> Any:
    """The same for answers that mean the same, so that one is no wrong answer where another is right."""
    final = extract(parse(completion).answer or "")
    number = parse_number(final)
    return " ".join(final.casefold().split()) if number is None else number


def as_sampled(question: Question, completion: str, tokenizer: ChatEncoder) -> str:
    """An answer through the chat template and the tokenizer, and back as the text of a sampled completion.

    Raises:
        UserError: the template refuses it.
    """
    messages = [{"role": "user", "content": question["prompt"]}, {"role": "assistant", "content": completion}]
    ids, mask = tokenizer.encode_chat(messages, question.get("tools") or ())
    end = len(mask) - mask[::-1].index(1)  # behind the answer's stop token
    start = end - mask[:end][::-1].index(0) if 0 in mask[:end] else 0
    return completion_text(tokenizer, ids[:start], ids[start:end], (tokenizer.eos_id,))

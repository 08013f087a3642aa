"""Held-out questions answered greedily: how many are right, with the uncertainty of the figure.

Each rank may take a slice of the questions; `EvalResult.merge` joins the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.generate.decode import Completion, Decoder, generate
from ray_pipeline.data.chat.completion_text import PromptTokenizer, completion_text
from ray_pipeline.evaluation.marking import are_right, is_well_formed
from ray_pipeline.evaluation.statistics import wilson_interval
from ray_pipeline.rewards.gym import oracle
from ray_pipeline.rollouts.rollout import Sampled

__all__ = ["EvalResult", "evaluate_questions", "wilson_interval"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass
class EvalResult:
    """Figures of a list of marked answers; all but `samples` follow from it.

    Attributes:
        samples: per question: prompt, completion, answer, correct, well_formed, tokens (length of the completion, end
            token included), finished (ended by itself), fits (the prompt left room in the context; else it counts as
            wrong), category, difficulty.
        interval: 95% bounds of the accuracy.
    """

    samples: list[dict[str, Any]]
    correct: list[bool] = field(init=False)
    accuracy: float = field(init=False)
    interval: tuple[float, float] = field(init=False)
    format_rate: float = field(init=False)
    finished_rate: float = field(init=False)
    mean_tokens: float = field(init=False)
    too_long: int = field(init=False)
    by_category: dict[str, float] = field(init=False)
    by_difficulty: dict[int, float] = field(init=False)

    def __post_init__(self) -> None:
        self.correct = [s["correct"] for s in self.samples]
        self.accuracy = _mean(self.correct)
        self.interval = wilson_interval(sum(self.correct), len(self.correct))
        self.format_rate = _mean([s["well_formed"] for s in self.samples])
        self.finished_rate = _mean([s["finished"] for s in self.samples])
        self.mean_tokens = _mean([s["tokens"] for s in self.samples])
        self.too_long = sum(not s["fits"] for s in self.samples)
        self.by_category = self._accuracy_by("category")
        self.by_difficulty = self._accuracy_by("difficulty")

    def _accuracy_by(self, key: str) -> dict[Any, float]:
        values = sorted({s[key] for s in self.samples})
        return {value: _mean([s["correct"] for s in self.samples if s[key] == value]) for value in values}

    @classmethod
    def merge(cls, parts: Iterable[EvalResult]) -> EvalResult:
        """The results of several slices as one, in the order given."""
        return cls([sample for part in parts for sample in part.samples])


def evaluate_questions(
    decoder: Decoder,
    tokenizer: PromptTokenizer,
    questions: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    max_batch: int = 256,
    tools: Sequence[dict[str, Any]] = (),
    write: Callable[[list[list[int]]], Sequence[Completion | Sampled]] | None = None,
) -> EvalResult:
    """Answer each question greedily and mark it.

    Args:
        tools: what every prompt says there is to call. write: another way to continue prompts than decoding alone.
        questions: {"prompt", "answer"} and optionally "category" and "difficulty"; a slice of them for one rank.
    """
    prompts = [tokenizer.encode_prompt(q["prompt"], tools) for q in questions]
    fits = [i for i, p in enumerate(prompts) if len(p) < decoder.config.max_position_embeddings]
    asked = [prompts[i] for i in fits]
    completions = write(asked) if write is not None else generate(
        decoder, asked, max_new_tokens=max_new_tokens, eos_ids={tokenizer.eos_id}, temperature=0, max_batch=max_batch
    )  # fmt: skip
    by_question = dict(zip(fits, completions, strict=True))
    nothing: Completion | Sampled = Completion([], [], finished=False)
    written = [by_question.get(i, nothing) for i in range(len(questions))]
    texts = [
        completion_text(tokenizer, prompt, completion.tokens, (tokenizer.eos_id,))
        for prompt, completion in zip(prompts, written, strict=True)
    ]
    right = are_right([(q["prompt"], text, str(q["answer"])) for q, text in zip(questions, texts, strict=True)])
    marked = enumerate(zip(questions, texts, written, right, strict=True))
    return EvalResult([_sample(*one, fits=i in by_question) for i, one in marked])


def _sample(
    question: dict[str, Any], text: str, completion: Completion | Sampled, right: bool, *, fits: bool
) -> dict[str, Any]:
    reference = str(question["answer"])
    return {
        "prompt": question["prompt"],
        "completion": text,
        "answer": oracle(reference) or reference,
        "correct": right,
        "well_formed": is_well_formed(question["prompt"], text, reference),
        "tokens": len(completion.tokens),
        "finished": completion.finished,
        "fits": fits,
        "category": str(question.get("category", "")),
        "difficulty": int(question.get("difficulty", 0)),
    }

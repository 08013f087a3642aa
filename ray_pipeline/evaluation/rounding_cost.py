"""What rounding costs: perplexity on held-out text and accuracy on held-out questions, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ray_pipeline.data.chat.completion_text import completion_text
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.evaluation.marking import are_right
from ray_pipeline.evaluation.proof import Program


@dataclass(frozen=True)
class HeldOut:
    """What is measured on.

    Attributes:
        documents: ids of texts. questions: with prompt and answer, as DATA_PREP wrote them.
        max_new_tokens: of an answer. context: tokens that the model holds.
    """

    tokenizer: ChatTokenizer
    documents: Sequence[list[int]]
    questions: Sequence[Mapping[str, Any]]
    max_new_tokens: int
    context: int

    def figures(self, program: Program) -> dict[str, float]:
        """`perplexity`, `accuracy` and what they are of; a figure without material is left out."""
        return _perplexity(self.documents, program) | self._accuracy(program)

    def _accuracy(self, program: Program) -> dict[str, float]:
        asked = []
        for question in self.questions:
            prompt = self.tokenizer.encode_prompt(question["prompt"])
            limit = min(self.max_new_tokens, self.context - len(prompt))
            if limit > 0:
                tokens = program.greedy(prompt, limit)
                text = completion_text(self.tokenizer, prompt, tokens, frozenset({self.tokenizer.eos_id}))
                asked.append((question["prompt"], text, str(question["answer"])))
        if not asked:
            return {}
        return {"accuracy": sum(are_right(asked)) / len(asked), "questions": float(len(asked))}


def _perplexity(documents: Sequence[list[int]], program: Program) -> dict[str, float]:
    values = [value for document in documents for value in program.token_logprobs(document)]
    told = [value for value in values if value is not None]
    if not told:
        return {}
    withheld = {"tokens_withheld": float(len(values) - len(told))} if len(told) < len(values) else {}
    return {"perplexity": math.exp(-math.fsum(told) / len(told)), "tokens": float(len(told))} | withheld


@dataclass
class RoundingCost:
    """The same figures of rounded and of full weights. `full`: our model as it was trained."""

    heldout: HeldOut
    full: Program

    @cached_property
    def before(self) -> dict[str, float]:
        """Measured once, when the first rounded kind asks."""
        return self.heldout.figures(self.full)

    def figures(self, program: Program) -> dict[str, float]:
        """Of a program that has the rounded weights, beside `perplexity_before` and `accuracy_before`."""
        after, before = self.heldout.figures(program), self.before
        return after | {f"{name}_before": before[name] for name in ("perplexity", "accuracy") if name in before}

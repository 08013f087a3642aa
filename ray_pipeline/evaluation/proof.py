"""Is what was exported the model that was trained? One form for every kind of file and every program that loads it.

Each program answers the same chats as our model in fp32, which holds the very weights of the file: text and chats as
token ids, log-probabilities, greedy answers, what begins a text and what ends an answer. Knows no program and no stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from model.convert.export_kinds import Tolerance
from model.generate.decode import Decoder, generate
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.errors import UserError

# What every tokenizer gets wrong first: digits, spaces, capitals, punctuation, other scripts, the thinking marks.
TEXTS = (
    "The answer is 1234567890.",
    "  two  spaces\n\n\tand lines \n",
    "don't WE'LL x_y (a+b)*c=12/3; \"quoted\"",
    "naïve café — 漢字 🙂",
    "<think>12+30=42</think>42",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
NEAR_TIE = 1e-3  # two tokens closer than this in log-probability may change places between two programs
LIKELY = 0.01  # tokens whose single difference is bounded
_SHOWN = 3


class Program(Protocol):
    """A program that has loaded an export. `name` has its version: "transformers 5.23.0"."""

    name: str

    def ids(self, text: str) -> list[int]:
        """Plain text, with what the program puts before it."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation that waits for an answer, through the file's chat template."""
        ...

    def ends_at(self, token: int) -> bool:
        """Whether it stops an answer at this token."""
        ...

    def logprobs(self, ids: list[int], first: int) -> Tensor:
        """Log-probabilities of what follows ids[:first], ids[:first + 1], ..., all ids but the last: [positions,
        vocab_size], NaN where the program does not tell."""
        ...

    def token_logprobs(self, ids: list[int]) -> list[float | None]:
        """Of every token but the first, after those before it; None where the program does not tell."""
        ...

    def greedy(self, prompt: list[int], limit: int) -> list[int]:
        """The likeliest answer: at most `limit` tokens, with the one that ends it."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@dataclass(frozen=True)
class Material:
    """What every program is asked.

    Attributes:
        questions: of the run's held-out ones. begins: plain text was trained on with a start token before it.
        ends: further tokens than the tokenizer's own that end an answer.
        max_new_tokens: of an answer.
    """

    tokenizer: ChatTokenizer
    questions: Sequence[str]
    begins: bool = False
    ends: frozenset[int] = frozenset()
    max_new_tokens: int = 16

    def chats(self) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """Conversations and tools: questions, then one with a system message, one with thinking, one with a call."""
        asked: list[list[dict[str, Any]]] = [[{"role": "user", "content": question}] for question in self.questions]
        first = asked[0] if asked else [{"role": "user", "content": "What is 2+3?"}]
        system = [{"role": "system", "content": "Be brief."}, *first]
        thought = [*first, {"role": "assistant", "content": "<think>so</think>7"}, *first]
        call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2+3"}}}
        calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
        called = [*first, calling, {"role": "tool", "content": "5"}]
        out: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
            (chat, []) for chat in (*asked, system, thought)
        ]
        if self.tokenizer.template.lists_tools:
            out += [(first, [TOOL]), (called, [TOOL])]
        return out


@dataclass(frozen=True)
class Check:
    """Outcome of one comparison.

    Attributes:
        name: the file. program: what loaded it, with its version.
        status: "passed", "failed", "refused" or "not run". A refused file is read as it should be, but its rounding
            makes another model of it. detail: what failed, or why it was not run.
        notes: what is in the file otherwise than asked, a sentence each.
    """

    name: str
    status: str
    figures: dict[str, float] = field(default_factory=dict)
    detail: str = ""
    program: str = ""
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values for export.json."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """Our greedy answer to a prompt and our log-probabilities along it: [tokens, vocab_size]."""

    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor


@torch.inference_mode()
def our_answers(model: Transformer, material: Material) -> list[Answer]:
    """To each question that fits the context; `model` is on the CPU, in fp32."""
    tokenizer = material.tokenizer
    prompts = [tokenizer.encode_prompt(question) for question in material.questions]
    prompts = [prompt for prompt in prompts if len(prompt) < model.config.max_position_embeddings]
    ends = {tokenizer.eos_id, *material.ends}
    completions = generate(Decoder(model), prompts, max_new_tokens=material.max_new_tokens, eos_ids=ends, temperature=0)
    out = []
    for prompt, completion in zip(prompts, completions, strict=True):
        rows = model(torch.tensor([prompt + completion.tokens]))[0].float().log_softmax(-1)
        out.append(Answer(prompt, completion.tokens, rows[len(prompt) - 1 : -1]))
    return out


def prove(program: Program, answers: Sequence[Answer], material: Material, tolerance: Tolerance) -> Check:
    """Hold the program against our answers; `Check.name` is left to the caller."""
    problems = _texts(program, material) + _chats(program, material) + _ends(program, material)
    problems = problems[:_SHOWN]
    total = _Comparison()
    different = 0
    for answer in answers:
        total.add(answer.logprobs, program.logprobs(answer.prompt + answer.tokens, len(answer.prompt)))
        different += not _same_answer(answer, program.greedy(answer.prompt, len(answer.tokens)))
    figures = total.figures() | {
        "greedy_answers_compared": float(len(answers)), "greedy_answers_different": float(different)
    }  # fmt: skip
    problems += total.withheld()
    far = total.problems(tolerance)
    if different and tolerance.agreement == 1:
        far.append(f"{different} of {len(answers)} greedy answers differ")
    coarse = figures["mean_logprob_difference"] <= tolerance.coarse
    status = "failed" if problems or (far and not coarse) else "refused" if far else "passed"
    return Check("", status, figures, "; ".join(problems + far), program.name)


def _texts(program: Program, material: Material) -> list[str]:
    begin = [material.tokenizer.bos_id] if material.begins else []
    return [f"ids of {t!r} differ" for t in TEXTS if program.ids(t) != begin + material.tokenizer.encode(t)]


def _chats(program: Program, material: Material) -> list[str]:
    out = []
    for messages, tools in material.chats():
        try:
            ours = material.tokenizer.encode_prompt(messages, tools)
        except UserError:
            continue  # the template has no place for it: nobody can render this
        if program.chat(messages, tools) != ours:
            kind = "with tools" if tools else "prompt"
            out.append(f"{kind} ids of {messages[0]['content']!r} ({len(messages)} messages) differ")
    return out


def _ends(program: Program, material: Material) -> list[str]:
    wanted = {material.tokenizer.eos_id, *material.ends}
    missing = [token for token in sorted(wanted) if not program.ends_at(token)]
    return [f"end tokens {missing} do not end an answer there"] if missing else []


def _same_answer(answer: Answer, theirs: list[int]) -> bool:
    """Up to where two tokens are so close that programs may differ."""
    for i, (mine, other) in enumerate(zip(answer.tokens, theirs, strict=False)):
        if mine != other:
            return bool((answer.logprobs[i, mine] - answer.logprobs[i, other]).abs() < NEAR_TIE)
    return len(answer.tokens) == len(theirs)


@dataclass
class _Comparison:
    """Running totals over positions."""

    positions: int = 0
    agreed: int = 0
    told: int = 0
    weighted: float = 0.0
    worst: float = 0.0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Log-probabilities of one answer, each [positions, vocab_size]; theirs are NaN where not told."""
        told = ~theirs.isnan()
        difference = (ours - theirs).abs().masked_fill(~told, 0.0).double()
        probability = ours.exp().masked_fill(~told, 0.0).double()
        best, other = ours.argmax(-1), theirs.nan_to_num(-math.inf).argmax(-1)
        gap = (ours.gather(1, best[:, None]) - ours.gather(1, other[:, None])).squeeze(1)
        self.positions += len(ours)
        self.told += int(told.any(-1).sum())
        self.agreed += int(((best == other) | (gap < NEAR_TIE)).sum())
        self.weighted += float((difference * probability).sum())
        self.worst = max(self.worst, float(difference.masked_fill(probability < LIKELY, 0.0).max()))

    def figures(self) -> dict[str, float]:
        """Rates and means."""
        count = max(self.positions, 1)
        return {
            "positions": float(self.positions),
            "greedy_agreement": self.agreed / count,
            "mean_logprob_difference": self.weighted / count,
            "max_logprob_difference": self.worst,
        }

    def withheld(self) -> list[str]:
        """What the program did not tell, a sentence."""
        if self.told >= max(self.positions, 1):
            return []
        return [f"log-probabilities of {self.told} of {self.positions} positions to compare"]

    def problems(self, allowed: Tolerance) -> list[str]:
        """What is beyond the tolerance, a sentence each."""
        found, out = self.figures(), list[str]()
        if found["greedy_agreement"] < allowed.agreement:
            out.append(
                f"likeliest token agrees at {found['greedy_agreement']:.1%} of positions, under {allowed.agreement:.0%}"
            )
        if found["mean_logprob_difference"] > allowed.mean:
            out.append(
                f"mean log-probability difference {found['mean_logprob_difference']:.3g} is over {allowed.mean:g}"
            )
        if found["max_logprob_difference"] > allowed.worst:
            out.append(
                f"largest log-probability difference {found['max_logprob_difference']:.3g} is over {allowed.worst:g}"
            )
        return out

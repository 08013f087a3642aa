"""Is what was exported the model that was trained? Each file is loaded by the program it is meant for and compared.

Compares with our own model in fp32, holding the weights as the file should hold them. Knows nothing of stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.convert.gguf import GgufType
from model.convert.tokenizer_start import begins_with_bos
from model.generate.decode import Decoder, generate
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.llama_cpp import LlamaCpp, LlamaMissing
from ray_pipeline.records.artifacts import load_model

# What every tokenizer gets wrong first: digits, spaces, capitals, punctuation, other scripts, the thinking marks.
TEXTS = (
    "The answer is 1234567890.",
    "  two  spaces\n\n\tand lines \n",
    "don't WE'LL x_y (a+b)*c=12/3; \"quoted\"",
    "naïve café — 漢字 🙂",
    "<think>12+30=42</think>42",
)
HF_TOLERANCE = 1e-3  # largest |Δ logit|; two fp32 programs that sum in different orders differ by about 1e-5
NEAR_TIE = 1e-3  # two tokens closer than this in logit may change places between two programs


@dataclass(frozen=True)
class GgufTolerance:
    """How far llama.cpp may be from our model.

    Attributes:
        agreement: least share of positions with the same likeliest token.
        mean: largest mean |Δ log p|, weighted by p. worst: largest |Δ log p| of any token with p >= 1%.
    """

    agreement: float
    mean: float
    worst: float


# A weight off by a rounding can send a token to another expert, so the largest difference of the rounded kinds is not
# bounded; the mean is what tells a wrong tensor (whole nats) from rounding.
GGUF_TOLERANCES: dict[GgufType, GgufTolerance] = {
    "f32": GgufTolerance(1.0, 1e-3, 1e-2),
    "f16": GgufTolerance(0.95, 0.02, math.inf),
    "q8_0": GgufTolerance(0.85, 0.1, math.inf),
}


@dataclass(frozen=True)
class Check:
    """Outcome of one comparison.

    Attributes:
        status: "passed", "failed" or "not run". detail: what failed, or why it was not run.
    """

    name: str
    status: str
    figures: dict[str, float] = field(default_factory=dict)
    detail: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values for checks.json."""
        return asdict(self)


def _outcome(name: str, figures: dict[str, float], problems: list[str]) -> Check:
    return Check(name, "failed" if problems else "passed", figures, "; ".join(problems))


def reference_answers(
    model: Transformer, tokenizer: ChatTokenizer, questions: Sequence[str], max_new_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and our greedy completion of each question that fits the context."""
    prompts = [tokenizer.encode_prompt(q) for q in questions]
    prompts = [p for p in prompts if len(p) < model.config.max_position_embeddings]
    completions = generate(
        Decoder(model), prompts, max_new_tokens=max_new_tokens, eos_ids={tokenizer.eos_id}, temperature=0
    )
    return [(prompt, completion.tokens) for prompt, completion in zip(prompts, completions, strict=True)]


@torch.inference_mode()
def _our_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocab_size] in fp32."""
    return model(torch.tensor([ids]))[0].float()


def _first_difference(ours: list[int], theirs: list[int]) -> int | None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return i
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _is_near_tie(logits: torch.Tensor, ours: int, theirs: int) -> bool:
    return bool((logits[ours] - logits[theirs]).abs() < NEAR_TIE)


@torch.inference_mode()
def check_hf(
    folder: Path, model: Transformer, tokenizer: ChatTokenizer, questions: Sequence[str], *, max_new_tokens: int = 32,
    begins: bool = False,
) -> Check:  # fmt: skip
    """Load a Hugging Face folder with the Auto classes: same logits, greedy tokens, token ids and rendered chats.

    Args:
        model: ours, on the CPU in fp32, with weights rounded to the folder's dtype. begins: see `check_gguf`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = [f"tokenizer: {p}" for p in _tokenizer_problems(their_tokenizer, tokenizer, questions, begins)]
    worst, different = 0.0, 0
    answers = reference_answers(model, tokenizer, questions, max_new_tokens)
    for prompt, completion in answers:
        ours = _our_logits(model, prompt + completion)
        other = theirs(torch.tensor([prompt + completion])).logits[0]
        worst = max(worst, float((ours - other).abs().max()))
        limit = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
        written = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=limit,
            do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
        )[0, len(prompt) :].tolist()  # fmt: skip
        at = _first_difference(completion, written)
        if at is not None:
            same_length = at < min(len(completion), len(written))
            tie = same_length and _is_near_tie(ours[len(prompt) + at - 1], completion[at], written[at])
            different += not tie
    if worst > HF_TOLERANCE:
        problems.append(f"largest logit difference {worst:.3g} is over {HF_TOLERANCE:g}")
    if different:
        problems.append(f"{different} of {len(answers)} greedy answers differ")
    figures = {
        "max_logit_difference": worst,
        "greedy_answers_compared": float(len(answers)),
        "greedy_answers_different": float(different),
    }
    return _outcome(folder.name, figures, problems)


@torch.inference_mode()
def check_native(
    folder: Path, model: Transformer, tokenizer: ChatTokenizer, questions: Sequence[str], *, max_new_tokens: int = 32,
    begins: bool = False,
) -> Check:  # fmt: skip
    """Load a folder of our own format: the same architecture, weights bit for bit, logits, ids and rendered chats.

    Args:
        model: on the CPU in fp32, with weights rounded to the folder's dtype. begins: see `check_gguf`.
    """
    try:
        loaded = load_model(folder).eval()
    except (UserError, RuntimeError) as error:
        return Check(folder.name, "failed", detail=f"it does not load: {error}")
    again, problems, worst = load_tokenizer(folder), [], 0.0
    if loaded.config != model.config:
        problems.append("config.json is of another architecture")
    ours, theirs = model.state_dict(), loaded.state_dict()
    different = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
    problems += [f"{name} differs" for name in different[:3]]
    answers = [] if problems else reference_answers(model, tokenizer, questions, max_new_tokens)
    for prompt, completion in answers:
        ids = prompt + completion
        worst = max(worst, float((_our_logits(model, ids) - _our_logits(loaded, ids)).abs().max()))
    if worst:
        problems.append(f"largest logit difference {worst:.3g} is over 0")
    same = all(again.encode(t) == tokenizer.encode(t) for t in TEXTS)
    same = same and begins_with_bos(folder) == begins
    if not same or any(again.encode_prompt(q) != tokenizer.encode_prompt(q) for q in questions):
        problems.append("the tokenizer gives other ids")
    figures = {"max_logit_difference": worst, "greedy_answers_compared": float(len(answers))}
    return _outcome(folder.name, figures, problems)


def _tokenizer_problems(theirs: Any, ours: ChatTokenizer, questions: Sequence[str], begins: bool) -> list[str]:
    begin = [ours.bos_id] if begins else []
    out = [f"ids of {t!r} differ" for t in TEXTS if theirs(t)["input_ids"] != begin + ours.encode(t)]
    for question in questions:
        asked = [{"role": "user", "content": question}]
        ids = theirs.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        if list(ids) != ours.encode_prompt(question):
            out.append(f"prompt ids of {question!r} differ")
        chat = [*asked, {"role": "assistant", "content": "<think>so</think>7"}, *asked]
        if theirs.apply_chat_template(chat, tokenize=False) != ours.template.render(chat):
            out.append(f"chat with {question!r} renders differently")
    if theirs.eos_token_id != ours.eos_id:
        out.append(f"eos is {theirs.eos_token_id}, not {ours.eos_id}")
    return out[:3]


@dataclass
class _Comparison:
    """Running totals over positions."""

    positions: int = 0
    withheld: int = 0
    agreed: int = 0
    weighted: float = 0.0
    worst: float = 0.0

    def add(self, logits: torch.Tensor, token: int, logprobs: dict[int, float]) -> None:
        """One position: our logits [vocab_size] against llama.cpp's likeliest tokens."""
        ours = torch.log_softmax(logits, -1)
        best = int(ours.argmax())
        self.positions += 1
        self.agreed += best == token or _is_near_tie(logits, best, token)
        for i, value in logprobs.items():
            mine = float(ours[i])
            difference = abs(mine - value)
            self.weighted += math.exp(mine) * difference
            if mine >= math.log(0.01):
                self.worst = max(self.worst, difference)

    def figures(self) -> dict[str, float]:
        """Rates and means."""
        count = max(self.positions, 1)
        return {
            "positions": float(self.positions),
            "positions_withheld": float(self.withheld),
            "greedy_agreement": self.agreed / count,
            "mean_logprob_difference": self.weighted / count,
            "max_logprob_difference": self.worst,
        }


def check_gguf(
    path: Path, kind: GgufType, model: Transformer, tokenizer: ChatTokenizer, questions: Sequence[str], *,
    max_new_tokens: int = 16, begins: bool = False,
) -> Check:  # fmt: skip
    """Load a GGUF file in llama.cpp: same token ids and chat prompts, and log-probabilities along our greedy answers.

    Args:
        model: ours, on the CPU in fp32, unrounded. begins: plain text was trained on with a start token before it.
    """
    answers = reference_answers(model, tokenizer, questions, max_new_tokens)
    context = max((len(p) + len(c) for p, c in answers), default=0) + 8
    try:
        llama = LlamaCpp(path, context=context, threads=torch.get_num_threads())
    except LlamaMissing as missing:
        return Check(path.name, "not run", detail=str(missing))
    except RuntimeError as error:
        return Check(path.name, "failed", detail=f"llama.cpp does not load it: {error}")
    begin = [tokenizer.bos_id] if begins else []
    problems = [
        f"ids of {t!r} differ" for t in TEXTS if llama.tokenize(t, special=False) != begin + tokenizer.encode(t)
    ]
    problems += [f"prompt ids of {q!r} differ" for q in questions if llama.prompt(q) != tokenizer.encode_prompt(q)]
    problems = problems[:3]
    total = _Comparison()
    for prompt, completion in answers:
        logits = _our_logits(model, prompt + completion)
        for i in range(len(completion)):
            got = llama.next_token(prompt + completion[:i])
            if got is None:
                total.withheld += 1
            else:
                total.add(logits[len(prompt) + i - 1], got.token, got.logprobs)
    figures, allowed = total.figures(), GGUF_TOLERANCES[kind]
    if not total.positions:
        problems.append("llama.cpp gave no log-probabilities to compare")
    if figures["greedy_agreement"] < allowed.agreement:
        problems.append(
            f"likeliest token agrees at {figures['greedy_agreement']:.1%} of positions, under {allowed.agreement:.0%}"
        )
    if figures["mean_logprob_difference"] > allowed.mean:
        problems.append(
            f"mean log-probability difference {figures['mean_logprob_difference']:.3g} is over {allowed.mean:g}"
        )
    if figures["max_logprob_difference"] > allowed.worst:
        problems.append(
            f"largest log-probability difference {figures['max_logprob_difference']:.3g} is over {allowed.worst:g}"
        )
    return _outcome(path.name, figures, problems)

"""From logits to the next token. Each request brings its own random numbers, drawn before it starts.

A token is the inverse of the cumulative distribution at the request's next uniform number, so what a request draws does
not depend on the other requests in the batch. Cuts and penalty are Hugging Face's, in the order it applies them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class NotFiniteLogits(ValueError):
    """A model whose logits are not finite numbers: its weights are spoiled, or overflow."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 is greedy, and the three cuts below then change nothing.
        top_k: 0 for all. top_p: 1 for all (arXiv:1904.09751).
        min_p: least probability relative to the likeliest token's; 0 for all (arXiv:2407.01082).
        repetition_penalty: logits of tokens seen in prompt or answer are divided by it where positive and multiplied
            where negative (CTRL, arXiv:1909.05858, §4.1); 1 for none.
    Raises:
        ValueError: for a setting outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # Written so that nan is refused as well.
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: must be from 0 (all tokens) to 1 (only the likeliest)")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty}: must be positive; 1 leaves the logits as they are, "
                "more makes tokens that were there before less likely"
            )


def draw_uniforms(seeds: list[int], count: int) -> Tensor:
    """Numbers in [0, 1) for `count` tokens of each request: float64 [len(seeds), count]."""
    out = torch.empty(len(seeds), count, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(out, seeds, strict=True):
        generator.manual_seed(seed)
        torch.rand(count, dtype=torch.float64, generator=generator, out=row)
    return out


def keep_top_k(logprobs: Tensor, k: int) -> Tensor:
    """-inf for all but the k likeliest tokens (ties at the border all stay). [rows, vocab_size] -> same."""
    border = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1).values[:, -1:]
    return logprobs.masked_fill(logprobs < border, -torch.inf)


def keep_top_p(logprobs: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of likeliest tokens that holds at least `p` of the mass (arXiv:1904.09751)."""
    ordered, index = logprobs.sort(dim=-1, descending=True)
    mass = ordered.softmax(-1)
    outside = mass.cumsum(-1) - mass >= p  # the mass before a token already suffices; the likeliest always stays
    outside[:, 0] = False
    return logprobs.masked_fill(torch.zeros_like(outside).scatter_(1, index, outside), -torch.inf)


def keep_min_p(logprobs: Tensor, p: float) -> Tensor:
    """-inf for tokens less likely than `p` times the likeliest one (arXiv:2407.01082). [rows, vocab_size] -> same."""
    return logprobs.masked_fill(logprobs < logprobs.amax(-1, keepdim=True) + math.log(p), -torch.inf)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make `seen` tokens (bool, same shape) less likely by `penalty`, whatever the sign of their logit."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """The token whose slice of [0, 1) holds the number.

    Args:
        logprobs: [rows, vocab_size], not necessarily normalised. uniforms: float64 [rows].
    Returns:
        [rows] int64; never a token of probability zero.
    """
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    # Rounding could lift the target to the total, behind which there is no token.
    target = torch.minimum(uniforms.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).squeeze(1)


def check_finite(logits: Tensor, logprobs: Tensor) -> None:
    """Raise NotFiniteLogits where a row of logits has a NaN or an infinity. `logprobs` are those of the logits.

    One NaN or infinity spoils the sum that a whole row is normalised by, so one column tells.
    """
    if bool(logprobs[:, 0].isfinite().all()):
        return
    if bool(logits.isfinite().all()):
        raise ValueError("the temperature is so close to 0 that logits over it overflow: use 0, which is greedy")
    raise NotFiniteLogits("the logits of the next token are not finite numbers")


def distributions(logits: Tensor, settings: Sampling, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the model says, and what is drawn from.

    Args:
        logits: [rows, vocab_size]. seen: bool, same shape: tokens of prompt and answer, for the repetition penalty.
    Returns:
        log softmax(logits / temperature) in fp32 (at temperature 1 when greedy), which a policy gradient needs; and
        the same after penalty and cuts, -inf where a token is cut and not normalised again.
    Raises:
        NotFiniteLogits: there is nothing to draw from.
    """
    logits, temperature = logits.float(), settings.temperature or 1.0
    logprobs = torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
    check_finite(logits, logprobs)
    kept = logprobs
    if settings.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs the tokens that were there before"
        # On logits, not on log-probabilities: what the penalty does depends on the sign.
        kept = penalize_repetition(logits, seen, settings.repetition_penalty)
        kept = torch.log_softmax(kept if temperature == 1 else kept / temperature, -1)
    if settings.temperature == 0:
        return logprobs, kept
    kept = keep_top_k(kept, settings.top_k) if settings.top_k else kept
    kept = keep_top_p(kept, settings.top_p) if settings.top_p < 1 else kept
    kept = keep_min_p(kept, settings.min_p) if settings.min_p else kept
    return logprobs, kept


def draw(kept: Tensor, uniforms: Tensor | None) -> Tensor:
    """A token of each distribution [rows, vocab_size]: at the uniform number [rows], or the likeliest without one."""
    if uniforms is not None:
        return inverse_cdf(kept, uniforms)
    # Of equally likely ones the first. On a CPU torch takes four to ten times as long over it as numpy (measured).
    return torch.from_numpy(kept.numpy().argmax(-1)) if kept.device.type == "cpu" else kept.argmax(-1)

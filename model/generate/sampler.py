"""From logits to the next token. Each request brings its own random numbers, drawn before it starts.

A token is the inverse of the cumulative distribution at the request's next uniform number, so what a request draws does
not depend on the other requests in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def choose(
    logits: Tensor, uniforms: Tensor | None, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probabilities.

    Args:
        logits: [rows, vocab_size]. uniforms: [rows] in [0, 1); None where temperature is 0.
        temperature: 0 takes the likeliest token. top_k: 0 keeps all. top_p: 1 keeps all.
    Returns:
        tokens [rows], and log softmax(logits / temperature) of them (at temperature 1 when greedy), before top-k and
        top-p cut anything: what a policy gradient needs.
    """
    logprobs = torch.log_softmax(logits.float() if temperature in (0.0, 1.0) else logits.float() / temperature, -1)
    if temperature == 0:
        best = logprobs.max(-1)
        return best.indices, best.values
    assert uniforms is not None, "sampling needs random numbers"
    kept = keep_top_k(logprobs, top_k) if top_k else logprobs
    kept = keep_top_p(kept, top_p) if top_p < 1 else kept
    tokens = inverse_cdf(kept, uniforms)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)

"""Which form of an operation runs on which device: an override where there is one, else the formula.

Tensors in, tensors out: nothing here knows of modules or of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels import plain
from model.kernels.cpu import blocked, expert_loop, fast_softmax, products
from model.kernels.cuda import fused_attention, grouped_experts
from model.kernels.rows import Plan
from model.kernels.weight_gradients import BackwardSplit

OVERRIDES: dict[tuple[str, str], Callable[..., Any]] = {
    ("product", "cpu"): products.product,
    ("transposed_product", "cpu"): products.transposed_product,
    ("attention", "cpu"): blocked.attention,
    ("attention", "cuda"): fused_attention.attention,
    ("experts", "cpu"): expert_loop.experts,
    ("experts", "cuda"): grouped_experts.experts,
    ("softmax_loss", "cpu"): fast_softmax.softmax_loss,
}


def chosen(operation: str, device: torch.device) -> Callable[..., Any]:
    """The form of an operation of `model.kernels.plain`, which says what its arguments are."""
    form: Callable[..., Any] = OVERRIDES.get((operation, device.type)) or getattr(plain, operation)
    return form


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b: [m, k] x [k, n] -> [m, n], into `out` if there is one; without a gradient."""
    return chosen("product", a.device)(a, b, out)


def transposed_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a^T b: [k, m], [k, n] -> [m, n], without a gradient."""
    return chosen("transposed_product", a.device)(a, b, out)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None, documents: bool
) -> Tensor:
    """softmax(q k^T * scale) v over what is visible: [batch, heads, seq, v_dim]."""
    return chosen("attention", q.device)(q, k, v, mask, scale, window, documents)


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, plan: Plan, split: BackwardSplit | None = None
) -> Tensor:
    """Weighted sum of every token's experts: [tokens, hidden] -> same. `gate_up` and `down` are parameters, read in the
    dtype of x; `split` lets their gradients be computed later (`model.kernels.weight_gradients`)."""
    return chosen("experts", x.device)(x, gate_up, down, weights, plan, split)


def softmax_loss(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(column) [rows, 1], and probabilities, of logits fp32 [rows, vocab_size], which may be overwritten."""
    return chosen("softmax_loss", logits.device)(logits, column)

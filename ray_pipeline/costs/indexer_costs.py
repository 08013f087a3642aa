"""What the indexer of sparse attention and its loss cost: kept bytes, arithmetic and messages (`model.attention`)."""

from __future__ import annotations

from ray_pipeline.costs.workload import FP32, Workload

BLOCK = 1 << 24  # numbers of scores at once (`model.attention.indexer`)


def indexer_tokens(work: Workload) -> int:
    """Bytes that one layer's indexer keeps for the backward pass, per token of the rank."""
    model, a, width = work.model, work.element, work.model.index_head_dim
    # Gradients of its queries, of whole rows' keys and of its weights, which the forward pass makes.
    total = a * model.index_n_heads * width + a * width * work.layout.sp + FP32 * model.index_n_heads
    total += a * width + 2 * FP32  # the key before its norm, and mean and deviation
    if work.bf16:  # the layer's input in fp32 for the weights
        total += model.hidden_size * FP32
    return total


def indexer_flops(work: Workload) -> int:
    """Per token of the rank and layer: scores to choose by, scores with gradients, and attention as their target.

    All of it is computed in the forward pass. A backward is reckoned at twice a forward, so a third is given.
    """
    model, heads = work.model, work.model.num_attention_heads // work.layout.tp
    times = 3 + (work.seq_len > model.index_topk)  # a score, two gradients of it; and one to choose by
    pair = 2 * times * model.index_n_heads * model.index_head_dim + 2 * heads * model.qk_head_dim
    return pair * (work.seq_len // 2) // 3


def indexer_messages(work: Workload) -> dict[str, tuple[int, int]]:
    """Axis -> bytes that one layer gives to rings and all-to-alls, in forward and backward of one micro-batch."""
    model, sp, tokens = work.model, work.layout.sp, work.tokens_at_once
    targets = FP32 * _targets(work)
    keys = tokens * sp * model.index_head_dim * work.element  # for every rank
    chosen = tokens * sp * work.seq_len if work.seq_len > model.index_topk else 0  # a byte for every key
    return {"tp": (2 * targets, 0), "sp": (sp * targets + keys + chosen, keys)}


def _targets(work: Workload) -> int:
    """Attention weights, summed over heads, of this rank's positions: a block has the keys that any rank's reads."""
    model, layout, seq = work.model, work.layout, work.seq_len
    window, largest = seq // layout.sp, max(model.num_attention_heads // layout.tp, model.index_n_heads)
    rows, total = max(1, BLOCK // (work.rows_at_once * largest * seq)), 0
    for begin in range(0, window, rows):
        end = min(begin + rows, window)
        total += (end - begin) * ((layout.sp - 1) * window + end)
    return work.rows_at_once * total

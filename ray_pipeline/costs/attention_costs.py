"""What attention keeps for the backward pass, by kind: per token of one rank, and per pair of tokens.

For sparse attention also what its indexer and the indexer's loss keep, compute and send.

Read off autograd's saved tensors of `model/attention`; a test holds every sum against them.
"""

from __future__ import annotations

from math import gcd

from model.kernels.limits import BLOCK, WORTH_CHOOSING, keeps_probabilities
from ray_pipeline.costs.kernels import Kernels, block_norm_bytes, norm_bytes, read_bytes
from ray_pipeline.costs.workload import BF16, FP32, Workload

INDEXER_BLOCK = 1 << 24  # scores that the indexer computes at a time (`model.attention.indexer`)


def attention_tokens(work: Workload, on: Kernels) -> int:
    """Norm, projections and what they give to the core, per token of the rank."""
    model = work.model
    total = block_norm_bytes(work) + read_bytes(model.hidden_size, work)
    total += (_latents(work) if model.is_latent else 0) + _core_tokens(work, on)
    return total + (indexer_tokens(work) if model.attention == "dsa" else 0)


def _latents(work: Workload) -> int:
    model, total = work.model, 0
    if model.q_lora_rank is not None:
        total += norm_bytes(model.q_lora_rank) + read_bytes(model.q_lora_rank, work)
    # In fp32 the latent is a view that keeps the rotary key beside it alive.
    total += norm_bytes(model.kv_lora_rank) + read_bytes(model.kv_lora_rank, work)
    return total + (0 if work.bf16 else FP32 * model.qk_rope_head_dim)


def _core_tokens(work: Workload, on: Kernels) -> int:
    """Queries, keys, values and output."""
    model, a, heads = work.model, work.element, work.model.num_attention_heads // work.layout.tp
    width, value = model.qk_head_dim, model.value_head_dim
    moved = heads * a * value if work.layout.sp > 1 else 0  # the output as it came back from the other ranks
    if model.position == "cope":
        # Everything is laid out by heads once more. The products with the table, and the output for its projection.
        keys = key_heads(work)
        return a * (heads * width + keys * (width + value)) + a * heads * (model.cope_positions + value)
    if _keeps_probabilities(work, on):
        return heads * a * 2 * (width + value) + moved
    padded = max(width, value)
    total = heads * (a * padded + FP32)  # output and log-sum-exp
    if value < width or work.layout.sp > 1:
        total += heads * a * value  # the output without padding, as the projection reads it
    total += a * width * 2 * heads
    if model.is_latent:
        return total + heads * a * (padded if value < width else model.qk_nope_head_dim + value)  # padded or a view
    # The one value head of MQA is a view that keeps the key beside it alive.
    return total + heads * a * value * (2 if model.attention == "mqa" and heads == 1 else 1)


def value_tokens(work: Workload, on: Kernels) -> int:
    """A value embedding: its gate before and after the factor, and the vector found; per token of the rank."""
    model = work.model
    heads = 1 if model.attention == "mqa" else model.num_kv_heads // work.layout.tp
    kept = work.element * heads * (2 + model.value_head_dim)
    view = model.is_latent and model.position == "rope" and model.value_head_dim >= model.qk_head_dim
    if view and not _keeps_probabilities(work, on):  # their sum is no view, which would keep the keys beside it
        kept -= work.element * heads * model.qk_nope_head_dim
    return kept


def key_heads(work: Workload) -> int:
    """Heads with keys and values that a rank has of its tokens, once they are shared out over tp and sp."""
    model, layout = work.model, work.layout
    keys = 1 if model.attention == "mqa" else model.num_kv_heads // layout.tp
    return keys * layout.sp // gcd(layout.sp, keys)


def entering(work: Workload) -> int:
    """Bytes per token that every tensor-parallel rank reads and its heads are made from."""
    model, a = work.model, work.element
    if not model.is_latent:
        return model.hidden_size * a + (2 * model.head_dim * a if model.attention == "mqa" else 0)
    queries = a * (model.hidden_size if model.q_lora_rank is None else model.q_lora_rank)
    return queries + (model.kv_lora_rank + model.qk_rope_head_dim) * a


def _keeps_probabilities(work: Workload, on: Kernels) -> bool:
    model = work.model
    reach = min(model.sliding_window, work.seq_len) if model.attention == "sliding" else work.seq_len
    keeps = keeps_probabilities(
        model.qk_head_dim, model.value_head_dim, reach, bf16=work.bf16, longest=on.blocked_attention
    )
    return on.blocked_attention > 0 and keeps


def _met(work: Workload) -> int:
    """Pairs of query and key that attention by blocks computes in a row.

    A block meets all that is before its end; with a sliding window what is in reach, and the strided tokens before.
    """
    seq, model, met = work.seq_len, work.model, 0
    for start in range(0, seq, BLOCK):
        stop, before = min(start + BLOCK, seq), start - model.sliding_window + 1
        chosen = model.attention == "sliding" and before >= WORTH_CHOOSING
        met += (stop - start) * (stop - before + -(-before // model.global_stride) if chosen else stop)
    return met


def core_flops(work: Workload, on: Kernels) -> int:
    """Forward, per token of the rank: what is computed, not what the mask leaves of it."""
    model, seq, heads = work.model, work.seq_len, work.model.num_attention_heads // work.layout.tp
    width, value = model.qk_head_dim, model.value_head_dim
    if model.position == "cope":  # the table is applied by every head; weights count it once
        return 2 * heads * ((width + value) * seq + width * model.cope_positions)
    value = value if _keeps_probabilities(work, on) else max(width, value)
    core = 2 * heads * (width + value) * (_met(work) if on.blocked_attention else seq**2) // seq
    return core + (indexer_flops(work) if model.attention == "dsa" else 0)


def attention_pairs(work: Workload, on: Kernels) -> int:
    """Per layer and micro-batch: what grows with the square of the sequence."""
    model, seq, a = work.model, work.seq_len, work.element
    heads = work.rows_at_once * (model.num_attention_heads // (work.layout.tp * work.layout.sp))
    if model.position == "cope":
        # Scores and probabilities in fp32, the latter once more in bf16; which scores were hidden.
        return (heads * (2 * FP32 + (BF16 if work.bf16 else 0)) + work.rows_at_once) * seq**2
    if on.blocked_attention:
        return heads * a * _met(work) if _keeps_probabilities(work, on) else 0
    return work.rows_at_once * seq**2 * a  # the documents' mask as a bias of the queries' dtype


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

    All of it is computed in the forward pass. A backward is counted as twice a forward, so a third is given.
    """
    model, heads = work.model, work.model.num_attention_heads // work.layout.tp
    times = 3 + (work.seq_len > model.index_topk)  # a score, two gradients of it; and one to choose by
    pair = 2 * times * model.index_n_heads * model.index_head_dim + 2 * heads * model.qk_head_dim
    return pair * (work.seq_len // 2) // 3


def indexer_messages(work: Workload) -> dict[str, tuple[int, int]]:
    """Axis -> bytes that one layer gives to rings and all-to-alls, in forward and backward of one micro-batch."""
    model, sp, tokens = work.model, work.layout.sp, work.tokens_at_once
    targets = FP32 * _target_weights(work)
    keys = tokens * sp * model.index_head_dim * work.element  # for every rank
    chosen = tokens * sp * work.seq_len if work.seq_len > model.index_topk else 0  # a byte for every key
    return {"tp": (2 * targets, 0), "sp": (sp * targets + keys + chosen, keys)}


def _target_weights(work: Workload) -> int:
    """Attention weights, summed over heads, of this rank's positions: a block has the keys that any rank's reads."""
    model, layout, seq = work.model, work.layout, work.seq_len
    window, largest = seq // layout.sp, max(model.num_attention_heads // layout.tp, model.index_n_heads)
    rows, total = max(1, INDEXER_BLOCK // (work.rows_at_once * largest * seq)), 0
    for begin in range(0, window, rows):
        end = min(begin + rows, window)
        total += (end - begin) * ((layout.sp - 1) * window + end)
    return work.rows_at_once * total

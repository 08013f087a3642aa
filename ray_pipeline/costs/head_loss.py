"""What the loss keeps for the backward pass, and what it needs while it is computed, by training stage.

Cross-entropy and distillation make their gradients in the forward pass, a few rows of logits at a time
(`model.layers.chunked_loss`). DPO and GRPO, which learn a token's weight only afterwards, compute logits again.
"""

from __future__ import annotations

from model.kernels.limits import FEWEST_ROWS
from ray_pipeline.costs.kernels import Kernels
from ray_pipeline.costs.workload import BF16, FP32, Workload

INDEX = 8  # bytes of an int64
# Of a block of logits, in fp32: the student's log-probabilities, the teacher's, their mixture, and two factors of a
# product; the divergences without a mixture need one less.
DISTRIBUTIONS = 5


def num_heads(work: Workload) -> int:
    """Times that the head is applied: by the model itself and by each MTP module in training."""
    return 1 + (work.model.num_nextn_predict_layers if work.trains_mtp else 0)


def _head_numbers(work: Workload) -> int:
    """This rank's slice of the head's weight."""
    return work.model.vocab_size // work.layout.tp * work.model.hidden_size


def makes_gradients_ahead(work: Workload) -> bool:
    """Whether the forward pass ends with the gradients of the head and of its input; else it keeps what they need."""
    return not computes_logits_again(work)


def computes_logits_again(work: Workload) -> bool:
    """Whether the backward pass begins with the head's forward."""
    return work.stage in ("dpo", "grpo")


def loss_tokens(work: Workload) -> int:
    """Per token and head: the head's input or its gradient, and which tokens count.

    Labels too where logits are computed again, and four numbers: for GRPO what its ratio, clipping and advantage leave.
    """
    return work.element * work.model.hidden_size + 1 + (INDEX + 4 * FP32 if computes_logits_again(work) else 0)


def kept_bytes(work: Workload) -> dict[str, int]:
    """What a micro-batch keeps besides, by name; the same for any number of tokens."""
    if makes_gradients_ahead(work):
        return {"gradients of the head": num_heads(work) * FP32 * _head_numbers(work)}
    return {}


def _chunk_bytes(work: Workload, on: Kernels, *, gradients: bool) -> int:
    """Logits at a time, as the product made them, and what is made of them.

    Args:
        gradients: they take the place of the logits; and where oneDNN makes it, their product with the states of the
            chunk is there before it is added to the sum.
    """
    vocab, element = work.model.vocab_size // work.layout.tp, BF16 if work.bf16 else FP32
    rows = min(max(FEWEST_ROWS, on.loss_bytes // (vocab * element)), work.tokens_at_once)
    # Each part of a chunk would take exchanges of its own where the vocabulary is cut.
    in_blocks = work.layout.tp == 1 and on.loss_block is not None
    block = max(1, (on.loss_block or 0) // vocab) if in_blocks else rows
    exact = min(rows, block) * vocab * FP32
    columns = min(vocab, on.loss_columns or vocab)
    made_apart = work.bf16 or on.onednn_from is not None
    product = element * columns * work.model.hidden_size * (gradients and made_apart)
    if work.stage == "distillation":
        # The teacher's logits too, and in fp32 the student's turn into the first of its distributions.
        return 2 * rows * vocab * element + max(exact * (DISTRIBUTIONS - (not work.bf16)), product)
    # A block's probabilities lie beside its logits, a whole chunk's take their place.
    return rows * vocab * element + max(exact * (work.bf16 + in_blocks), product)


def forward_bytes(work: Workload, on: Kernels) -> dict[str, int]:
    """What the end of the model has besides what it keeps, when its last loss is computed: by name."""
    # The hidden states and those that count; under autocast once more, and the head's weight. Of the teacher the same,
    # but for the hidden states, which came with the batch. What computes logits again keeps what it reads.
    ahead, numbers = makes_gradients_ahead(work), work.tokens_at_once * work.model.hidden_size
    models = 2 if work.stage == "distillation" else 1
    states = numbers * (FP32 + (models * FP32 if ahead or work.bf16 else 0))
    casts = models * BF16 * (numbers + _head_numbers(work)) if work.bf16 and ahead else 0
    chunk = _chunk_bytes(work, on, gradients=ahead)
    return {"chunk of logits": chunk, "loss": states + casts}


def backward_bytes(work: Workload, on: Kernels) -> dict[str, int]:
    """What the backward pass of the loss needs besides what it finds, by name."""
    if makes_gradients_ahead(work):
        return {"loss": 0}
    return {
        "chunk of logits": _chunk_bytes(work, on, gradients=True),
        "gradients of the head": FP32 * _head_numbers(work),
        "loss": work.tokens_at_once * work.model.hidden_size * work.element,
    }

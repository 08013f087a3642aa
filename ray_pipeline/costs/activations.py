"""What the forward pass keeps for the backward pass, tensor by tensor, in bytes per token of one rank.

Read off autograd's saved tensors of the layers in `model/`; a test holds every sum against them. The residual stream is
fp32, `a` is the width of a matmul's operand in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from model.config import ModelConfig
from ray_pipeline.costs.attention import attention_pairs, attention_tokens
from ray_pipeline.costs.kernels import Kernels, block_norm_bytes, read_bytes
from ray_pipeline.costs.weights import Weight, head_weight, layer_weights, mtp_projection
from ray_pipeline.costs.workload import BF16, FP32, Part, Workload

INDEX = 8  # bytes of an int64


def dense_tokens(work: Workload, on: Kernels, copies: int = 2) -> int:
    """Norm and SwiGLU, per token."""
    model = work.model
    inner = model.intermediate_size // work.layout.tp
    # gate, silu(gate), up and their product
    return block_norm_bytes(work, on) + read_bytes(model.hidden_size, work, copies) + 4 * inner * work.element


def expert_tokens(work: Workload, on: Kernels, copies: int = 2) -> int:
    """Norm, router, routed and shared experts, per token, with routing in balance."""
    model, a, k = work.model, work.element, work.model.num_experts_per_tok
    hidden, inner = model.hidden_size, model.moe_intermediate_size // work.layout.tp
    copies = copies if model.n_shared_experts else 0
    total = block_norm_bytes(work, on) + read_bytes(hidden, work, copies, as_fp32=True)
    total += _router(model)
    exchanged = work.layout.ep > 1
    # Four permutations of the chosen rows as int64: by expert (rows, weights), and back; two more after an exchange.
    total += k * INDEX * (3 if not exchanged else 6)
    rows = hidden * a + 5 * inner * a  # input; gate and up, silu(gate), silu(gate) * up, and that times the weight
    total += k * (rows + a)
    total += 4 * (model.n_shared_experts * inner) * a
    return total


def _router(model: ModelConfig) -> int:
    """Scores, chosen experts, their weights before and after normalisation; a balancing loss, the scores' sum."""
    k = model.num_experts_per_tok
    total = FP32 * (model.n_routed_experts + (model.aux_loss_alpha > 0)) + INDEX * k
    return total + (FP32 * (k + 1) if model.norm_topk_prob else 0)


def layer_bytes(work: Workload, on: Kernels, layer: int) -> int:
    """What one block keeps of one micro-batch under the layout's activation checkpointing."""
    model, tokens = work.model, work.tokens_at_once
    checkpointing = work.layout.activation_checkpointing
    if checkpointing == "full":
        return tokens * FP32 * model.hidden_size  # its input alone
    # The matmul before an MTP block makes its stream bf16, of which matmuls share one tensor.
    copies = 1 if layer >= model.num_hidden_layers else 2
    feed_forward = expert_tokens if model.is_moe_layer(layer) else dense_tokens
    rest = tokens * feed_forward(work, on, copies)
    if checkpointing == "selective":
        return tokens * FP32 * model.hidden_size + rest
    return tokens * attention_tokens(work, on, copies) + attention_pairs(work, on) + rest


def cast_weights(work: Workload, weights: Iterable[Weight]) -> int:
    """Autocast's bf16 copies of the matrices; a micro-batch's graph keeps its own until its backward."""
    if not work.bf16:
        return 0
    layout = work.layout
    return sum(BF16 * weight.local(layout.tp, layout.ep) for weight in weights if weight.matmul)


def tail_bytes(work: Workload, on: Kernels) -> int:
    """What the end of the model keeps of one micro-batch besides its layers and logits: norm, head, MTP modules."""
    model, tokens = work.model, work.tokens_at_once
    head = read_bytes(model.hidden_size, work, 1) + INDEX + 1  # labels, and which of them count
    total = tokens * (block_norm_bytes(work, on) + head)
    if work.trains_mtp:
        per_module = tokens * (_joined(work, on) + head) + layer_bytes(work, on, model.num_hidden_layers)
        total += model.num_nextn_predict_layers * (per_module + rotation_bytes(work))
    return total


def logits_bytes(work: Workload) -> int:
    """Log-probabilities of one head on one micro-batch: this rank's slice of the vocabulary, fp32 at any precision."""
    return work.tokens_at_once * FP32 * work.model.vocab_size // work.layout.tp


def num_heads(work: Workload) -> int:
    """Times that the head is applied: by the model itself and by each MTP module in training."""
    return 1 + (work.model.num_nextn_predict_layers if work.trains_mtp else 0)


def _joined(work: Workload, on: Kernels) -> int:
    """An MTP module around its block: two norms, their outputs side by side into one matmul, and a norm after it."""
    return 3 * block_norm_bytes(work, on) + work.element * 2 * work.model.hidden_size


def rotation_bytes(work: Workload) -> int:
    """Complex rotations of a micro-batch's positions, which all layers of a part share."""
    return work.tokens_at_once * 2 * FP32 * work.model.rotary_dim // 2


def recursion_bytes(work: Workload) -> int:
    """What every pass through the stack made; its input is the first norm's, or a checkpoint's."""
    model = work.model
    return model.recursion_depth * work.tokens_at_once * FP32 * model.hidden_size if model.recursion_depth > 1 else 0


def carried_bytes(work: Workload, part: Part) -> int:
    """Embeddings that came down the pipeline for the MTP modules, kept to collect their gradient."""
    if part.first or not work.model.num_nextn_predict_layers:
        return 0
    return work.tokens_at_once * FP32 * work.model.hidden_size


def kept_casts(work: Workload, part: Part) -> Iterator[Weight]:
    """Matrices whose bf16 copy a graph keeps; what is computed again in backward is cast again."""
    model, checkpointing = work.model, work.layout.activation_checkpointing
    ahead = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
    trained = [*part.layers, *(ahead if part.last and work.trains_mtp else ())]
    if checkpointing != "full":
        for layer in trained:
            for weight in layer_weights(model, layer):
                if checkpointing == "none" or weight.kind != "attention":
                    # Autocast keeps one copy for all passes, but of experts' weights, which are cast by hand.
                    again = model.recursion_depth if weight.expert and layer < model.num_hidden_layers else 1
                    yield from [weight] * again
    if part.last:
        yield head_weight(model)
        if work.trains_mtp:
            yield from [mtp_projection(model)] * model.num_nextn_predict_layers


def part_bytes(work: Workload, on: Kernels, part: Part) -> int:
    """Everything that one micro-batch in flight keeps on a part of the pipeline, its log-probabilities left out."""
    total = work.model.recursion_depth * sum(layer_bytes(work, on, layer) for layer in part.layers)
    total += recursion_bytes(work)
    total += rotation_bytes(work) + carried_bytes(work, part) + cast_weights(work, kept_casts(work, part))
    if work.layout.activation_checkpointing != "none":
        total += work.rows_at_once * work.seq_len**2  # the documents' mask, for the second forward
    return total + (tail_bytes(work, on) if part.last else 0)

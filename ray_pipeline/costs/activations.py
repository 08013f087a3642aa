"""What the forward pass keeps for the backward pass, tensor by tensor, in bytes per token of one rank.

Read off autograd's saved tensors of the layers in `model/`; a test holds every sum against them. The residual stream is
fp32, `a` is the width of a matmul's operand in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from model.config import ModelConfig
from model.kernels.limits import row_step
from ray_pipeline.costs.attention_costs import attention_pairs, attention_tokens, value_tokens
from ray_pipeline.costs.expert_rows import hops
from ray_pipeline.costs.head_loss import INDEX, loss_tokens, makes_gradients_ahead, num_heads
from ray_pipeline.costs.kernels import Kernels, block_norm_bytes, expected_rows, read_bytes
from ray_pipeline.costs.weights import Weight, head_weight, layer_weights, mtp_projection
from ray_pipeline.costs.workload import BF16, FP32, Part, Workload


def dense_tokens(work: Workload) -> int:
    """Norm and SwiGLU, per token."""
    model = work.model
    inner = model.intermediate_size // work.layout.tp
    # gate, up and their product
    return block_norm_bytes(work) + read_bytes(model.hidden_size, work) + 3 * inner * work.element


def expert_tokens(work: Workload) -> int:
    """Norm, router and shared experts, per token, and where its rows among the routed ones are."""
    model, a, k = work.model, work.element, work.model.num_experts_per_tok
    hidden, inner = model.hidden_size, model.moe_intermediate_size // work.layout.tp
    # Routed experts gather their rows from it; those of other ranks arrive as rows.
    read = model.n_shared_experts > 0 or work.layout.ep == 1
    total = block_norm_bytes(work) + read_bytes(hidden, work, by_products=read, as_fp32=True)
    total += _router(model) + (k * INDEX if work.layout.ep == 1 else 0)
    return total + 3 * (model.n_shared_experts * inner) * a


def routed_rows(work: Workload, on: Kernels) -> int:
    """Rows that this rank's routed experts compute of a micro-batch, with routing in balance."""
    model = work.model
    # Of all ranks that share the experts out: this rank has 1 / ep of the experts, and of what they are sent.
    tokens, chosen, experts = work.tokens_at_once * work.layout.ep, model.num_experts_per_tok, model.n_routed_experts
    matrix = model.hidden_size * 2 * model.moe_intermediate_size // work.layout.tp
    large = on.onednn_from is not None and tokens * chosen / experts * matrix >= on.onednn_from
    padded = on.pads_rows and (work.bf16 or large)
    multiple = row_step(tokens * chosen / experts, bf16=work.bf16) if padded else 1
    return expected_rows(tokens, chosen, experts, multiple) // work.layout.ep


def routed_bytes(work: Workload, on: Kernels) -> int:
    """What the routed experts keep of a micro-batch."""
    hidden, inner = work.model.hidden_size, work.model.moe_intermediate_size // work.layout.tp
    # The token it is of; gate and up; the weight.
    row = INDEX + work.element * (2 * inner + 1)
    total: float = routed_rows(work, on) * row
    way = hops(work)
    if way:  # what arrived last is kept as it came, with the place of every expert's row
        total += way[-1].rows * (work.element * hidden + way[-1].width * INDEX)
    return round(total + sum(hop.route_bytes() for hop in way))


def arrived_bytes(work: Workload) -> int:
    """What a layer that is computed again keeps of a micro-batch so that nothing has to be sent again between nodes."""
    return round(sum(hop.arrived_bytes(work, rows=index == 0) for index, hop in enumerate(hops(work))))


def _router(model: ModelConfig) -> int:
    """Scores, chosen experts, their weights before and after normalisation.

    A balancing loss keeps the scores' sum as well, and one within sequences whether the token counts.
    """
    k, balanced = model.num_experts_per_tok, model.aux_loss_alpha > 0
    total = FP32 * (model.n_routed_experts + balanced + (balanced and model.seq_aux)) + INDEX * k
    return total + (FP32 * (k + 1) if model.norm_topk_prob else 0)


def layer_bytes(work: Workload, on: Kernels, layer: int) -> int:
    """What one block keeps of one micro-batch under the layout's activation checkpointing."""
    model, tokens = work.model, work.tokens_at_once
    checkpointing = work.layout.activation_checkpointing
    if checkpointing == "full":  # its input, and what came from other ranks
        return tokens * FP32 * model.hidden_size + (arrived_bytes(work) if model.is_moe_layer(layer) else 0)
    if model.is_moe_layer(layer):
        rest = tokens * expert_tokens(work) + routed_bytes(work, on)
    else:
        rest = tokens * dense_tokens(work)
    if checkpointing == "selective":
        return tokens * FP32 * model.hidden_size + rest
    rest += tokens * value_tokens(work, on) if model.has_value_embedding(layer) else 0
    return tokens * attention_tokens(work, on) + attention_pairs(work, on) + rest


def cast_weights(work: Workload, weights: Iterable[Weight]) -> int:
    """Autocast's bf16 copies of the matrices; a micro-batch's graph keeps its own until its backward."""
    if not work.bf16:
        return 0
    layout = work.layout
    return sum(BF16 * weight.local(layout.tp, layout.ep) for weight in weights if weight.matmul)


def tail_bytes(work: Workload, on: Kernels) -> int:
    """What the end of the model keeps of one micro-batch besides its layers: norm, loss, MTP modules."""
    model, tokens = work.model, work.tokens_at_once
    total = tokens * (block_norm_bytes(work) + num_heads(work) * loss_tokens(work))
    if work.trains_mtp:
        around = tokens * _joined(work) + rotation_bytes(work)
        total += sum(layer_bytes(work, on, layer) + around for layer in model.mtp_layers)
    return total


def _joined(work: Workload) -> int:
    """An MTP module around its block: two norms, their outputs side by side into one matmul, and a norm after it."""
    return 3 * block_norm_bytes(work) + work.element * 2 * work.model.hidden_size


def rotation_bytes(work: Workload) -> int:
    """Complex rotations of a micro-batch's positions, which all layers of a part share."""
    return work.tokens_at_once * 2 * FP32 * work.model.rotary_dim // 2


def recursion_bytes(work: Workload) -> int:
    """What every pass through the stack made; its input is the first norm's, or a checkpoint's."""
    model = work.model
    return model.recursion_depth * work.tokens_at_once * FP32 * model.hidden_size if model.recursion_depth > 1 else 0


def residual_bytes(work: Workload, part: Part) -> int:
    """The stream in front of every learned scale of it."""
    layers = len(part.layers) * work.model.recursion_depth if work.model.residual_scales else 0
    return layers * work.tokens_at_once * FP32 * work.model.hidden_size


def carried_bytes(work: Workload, part: Part) -> int:
    """Embeddings that came down the pipeline for later readers, kept to collect their gradient."""
    if part.first or not work.model.hands_embeddings_on:
        return 0
    return work.tokens_at_once * FP32 * work.model.hidden_size


def kept_casts(work: Workload, part: Part) -> Iterator[Weight]:
    """Matrices whose bf16 copy a graph keeps; what is computed again in backward is cast again."""
    model, checkpointing = work.model, work.layout.activation_checkpointing
    trained = [*part.layers, *(model.mtp_layers if part.last and work.trains_mtp else ())]
    if checkpointing != "full":
        for layer in trained:
            for weight in layer_weights(model, layer):
                if checkpointing == "none" or weight.kind != "attention":
                    # Autocast keeps one copy for all passes, but of experts' weights, which are cast by hand.
                    again = model.recursion_depth if weight.expert and layer < model.num_hidden_layers else 1
                    yield from [weight] * again
    if part.last:
        if not makes_gradients_ahead(work):
            yield head_weight(model)
        if work.trains_mtp:
            yield from [mtp_projection(model)] * model.num_nextn_predict_layers


def part_bytes(work: Workload, on: Kernels, part: Part) -> int:
    """Everything that one micro-batch in flight keeps on a part of the pipeline, but for the loss's `kept_bytes`."""
    total = work.model.recursion_depth * sum(layer_bytes(work, on, layer) for layer in part.layers)
    total += recursion_bytes(work) + residual_bytes(work, part)
    total += rotation_bytes(work) + carried_bytes(work, part) + cast_weights(work, kept_casts(work, part))
    if work.layout.activation_checkpointing != "none":
        total += work.rows_at_once * work.seq_len**2  # the documents' mask, for the second forward
    return total + (tail_bytes(work, on) if part.last else 0)

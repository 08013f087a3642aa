"""Bytes that one rank sends per optimizer step, by axis of the layout and operation, and how long that takes.

Read off `model.parallel`, the pipeline and DeepSpeed. Rings are assumed for reductions; in all-to-alls every rank keeps
its own share. Messages of a few numbers (weights of the loss, norms, counts of rows) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from model.config_rules import VALUE_GATE_FEATURES
from model.parallel.placement import ranks_of
from ray_pipeline.costs.attention_costs import entering, indexer_messages, key_heads
from ray_pipeline.costs.expert_rows import hops
from ray_pipeline.costs.hardware_table import Hardware
from ray_pipeline.costs.head_loss import computes_logits_again, num_heads
from ray_pipeline.costs.weights import Weight, alike, part_weights, trained_weights
from ray_pipeline.costs.workload import FP32, Part, Workload
from ray_pipeline.engine import zero_settings

# Of messages within layers, axis -> operation.
WITHIN_LAYERS = {"tp": "all-reduce", "sp": "all-to-all", "ep": "all-to-all", "ep, nodes": "all-to-all"}


@dataclass(frozen=True)
class Traffic:
    """One kind of message.

    Attributes:
        bytes: sent by a rank, per optimizer step.
    """

    axis: str
    operation: str
    bytes: int


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other: how many, and how far apart their numbers are."""

    size: int
    stride: int

    def seconds(self, sent: float, hardware: Hardware, *, ring: bool) -> float:
        """Time to send `sent` bytes: a ring is as slow as its slowest link, an all-to-all uses both at once."""
        near = max(1, min(self.size, hardware.node // self.stride))  # of the group, on one node
        intra, inter = hardware.intra * hardware.links, hardware.inter * hardware.links
        if self.size <= near:
            return sent / intra
        if ring:
            return sent / inter
        away = (self.size - near) / max(1, self.size - 1)
        return max(sent * away / inter, sent * (1 - away) / intra)


def groups(work: Workload) -> dict[str, Group]:
    """Axis -> its group in the grid (pp, dp, sp, tp), tp fastest."""
    layout = work.layout
    near, far = layout.dispatch_sizes(work.node)
    return {
        "tp": Group(layout.tp, 1),
        "sp": Group(layout.sp, layout.tp),
        "ep": Group(near, 1),
        "ep, nodes": Group(far, near),
        "dp": Group(work.replicas, layout.tp),
        "dp, experts": Group(work.expert_replicas, layout.tp * layout.ep),
        "pp": Group(layout.pp, layout.tp * work.replicas),
    }


def _ring(size: int, n: int) -> int:
    """One pass around the ring: a reduce-scatter, or an all-gather; an all-reduce is two."""
    return size * (n - 1) // n


def layer_messages(work: Workload, layer: int) -> dict[str, tuple[int, int]]:
    """Axis -> bytes sent by one block in forward and backward of one micro-batch."""
    model, layout, tokens, a = work.model, work.layout, work.tokens_at_once, work.element
    moe = model.is_moe_layer(layer)
    # tp: both halves of the block sum their outputs; backward sums the gradients of what every rank read.
    out = model.hidden_size * a
    read = entering(work) + model.hidden_size * a
    read += model.num_experts_per_tok * FP32 if moe else 0
    read += VALUE_GATE_FEATURES * a if model.has_value_embedding(layer) and model.attention != "mqa" else 0
    # sp: queries, keys and values turn positions into heads, the output turns them back.
    heads, keys = model.num_attention_heads // layout.tp, key_heads(work)
    exchanged = (heads + keys) * (model.qk_head_dim + model.value_head_dim) * a
    again = _repeated(layout.activation_checkpointing)
    tp_forward = 2 * _ring(tokens * 2 * out, layout.tp)
    # A repetition ends with the last tensor that backward reads, before the sum that it would end with.
    tp_again = 2 * _ring(tokens * out * again["feed-forward"], layout.tp)
    sp_forward = sp_backward = _ring(tokens * exchanged, layout.sp)
    if model.attention == "dsa":
        given = indexer_messages(work)
        tp_forward += _ring(given["tp"][0], layout.tp)
        tp_again += _ring(given["tp"][0], layout.tp) * again["attention"]
        sp_forward += _ring(given["sp"][0], layout.sp)
        sp_backward += _ring(given["sp"][1], layout.sp)
    return {
        "tp": (tp_forward, 2 * _ring(tokens * read, layout.tp) + tp_again),
        "sp": (sp_forward, sp_backward + sp_forward * again["attention"]),
        **(_dispatch(work) if moe else {}),
    }


def _dispatch(work: Workload) -> dict[str, tuple[int, int]]:
    """Axis -> bytes on the way to experts and back. A layer that is computed again has kept what came over its first
    hop."""
    found = {}
    for index, hop in enumerate(hops(work)):
        forward, backward = hop.sent(work)
        again = hop.sent_again(work) if index and work.layout.activation_checkpointing == "full" else 0
        found[hop.axis] = (round(forward), round(backward + again))
    return found


def _repeated(checkpointing: str) -> dict[str, int]:
    """Which halves of a block the backward pass runs forward again."""
    return {"attention": int(checkpointing != "none"), "feed-forward": int(checkpointing == "full")}


def part_messages(work: Workload, part: Part) -> dict[str, tuple[int, int]]:
    """Axis -> bytes sent by one part in forward and backward of one micro-batch, pipeline apart."""
    model, tp = work.model, work.layout.tp
    layers = list(part.layers) * model.recursion_depth
    if part.last and work.trains_mtp:
        layers += model.mtp_layers
    total = {axis: [0, 0] for axis in WITHIN_LAYERS}
    for layer, number in alike(model, layers):
        for axis, (forward, backward) in layer_messages(work, layer).items():
            total[axis][0] += number * forward
            total[axis][1] += number * backward
    stream = 2 * _ring(work.tokens_at_once * model.hidden_size * FP32, tp)
    if part.first:
        total["tp"][0] += stream  # every rank looks up its slice of the vocabulary
    if part.last:
        normalisers = 2 * _ring(3 * FP32 * work.tokens_at_once, tp)  # logits are not sent
        total["tp"][0] += num_heads(work) * normalisers
        total["tp"][1] += num_heads(work) * (stream + (normalisers if computes_logits_again(work) else 0))
    return {axis: (forward, backward) for axis, (forward, backward) in total.items()}


def boundary_bytes(work: Workload) -> int:
    """One message between two parts: hidden states, and embeddings for later readers, in fp32."""
    tensors = 2 if work.model.hands_embeddings_on else 1
    return tensors * work.tokens_at_once * work.model.hidden_size * FP32


def _crossings(work: Workload, pp_rank: int) -> int:
    """Messages to other ranks that one micro-batch, forward and backward, makes this rank send."""
    held = ranks_of(work.layout.schedule, work.layout.pp)
    return sum((a == pp_rank) + (b == pp_rank) for a, b in pairwise(held) if a != b)


def _gradients(work: Workload, weights: int, frozen: int, n: int) -> dict[str, int]:
    """Operation -> bytes per step for `weights` numbers that are trained and `frozen` ones, which `n` ranks hold."""
    zero, m, size = work.layout.zero_stage, work.micro_batches, FP32 * weights
    if n == 1 or not weights + frozen * (zero == 3):
        return {}
    if zero == 0:
        return {"all-reduce": 2 * _ring(size, n)}
    if zero < 3:  # DeepSpeed reduces whole buckets everywhere; under ZeRO 2 after every micro-batch
        return {"all-reduce": 2 * _ring(size, n) * (m if zero == 2 else 1), "all-gather": _ring(size, n)}
    # Weights that fit below the limit stay from forward to backward; others come twice.
    gathers = m * (2 if weights + frozen > zero_settings.LIVE else 1)
    return {"reduce-scatter": m * _ring(size, n), "all-gather": gathers * _ring(FP32 * (weights + frozen), n)}


def _numbers(work: Workload, weights: Iterable[Weight], *, expert: bool) -> int:
    cut = work.layout.ep > 1
    return sum(w.local(work.layout.tp, work.layout.ep) for w in weights if (w.expert and cut) == expert)


def rank_traffic(work: Workload, pp_rank: int) -> list[Traffic]:
    """What a rank at place `pp_rank` of the pipeline sends in a step."""
    parts, m, found = work.parts_of_rank(pp_rank), work.micro_batches, []
    for axis, operation in WITHIN_LAYERS.items():
        messages = [part_messages(work, part)[axis] for part in parts]
        if sent := sum(map(sum, messages)):
            found.append(Traffic(axis, operation, m * sent))
    if crossings := _crossings(work, pp_rank):
        found.append(Traffic("pp", "send", m * crossings * boundary_bytes(work)))
    return found + gradient_traffic(work, pp_rank)


def gradient_traffic(work: Workload, pp_rank: int) -> list[Traffic]:
    """Of that, what replicas of the same weights send each other."""
    parts, found = work.parts_of_rank(pp_rank), []
    trained = [weight for part in parts for weight in trained_weights(work, part.layers)]
    base = [] if work.lora is None else [weight for part in parts for weight in part_weights(work.model, part.layers)]
    for axis, expert, n in (("dp", False, work.replicas), ("dp, experts", True, work.expert_replicas)):
        numbers, frozen = _numbers(work, trained, expert=expert), _numbers(work, base, expert=expert)
        found += [Traffic(axis, operation, size) for operation, size in _gradients(work, numbers, frozen, n).items()]
    return found

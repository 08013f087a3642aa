"""Bytes that a rank holds at its fullest moment, by kind.

The schedule is played once: activations come with every forward and go with its backward, gradients and buckets are
there from the first backward on, and the loss and the optimizer's update are moments of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ray_pipeline.costs.activations import cast_weights, layer_bytes, part_bytes
from ray_pipeline.costs.head_loss import backward_bytes, forward_bytes, kept_bytes
from ray_pipeline.costs.held import Memory
from ray_pipeline.costs.kernels import Kernels, kernels
from ray_pipeline.costs.weights import Weight, layer_weights, part_weights, trained_weights
from ray_pipeline.costs.whole_copies import gathering_bytes
from ray_pipeline.costs.workload import FP32, Part, Workload, without_checkpointing
from ray_pipeline.engine import zero_settings
from ray_pipeline.engine.pipeline.schedule import build_schedule

BATCH = 3 * 8  # bytes per token: tokens, labels and document numbers as int64


@dataclass(frozen=True)
class _Held:
    """Numbers of a rank's parameters.

    Attributes:
        full: before ZeRO. shard: of them, its own under ZeRO. largest: of a single parameter.
        persistent: too small for ZeRO 3 to take apart. gathered: what ZeRO 3 brings together from other ranks.
        maps: weights of matrix products but for the head, which Muon moves. largest_map: of a single parameter.
    """

    full: int
    shard: int
    largest: int
    persistent: int
    gathered: int
    maps: int
    largest_map: int


@dataclass(frozen=True)
class _Moment:
    """Of a pass over the schedule.

    Attributes:
        activations: bytes. losses: micro-batches whose loss waits for its backward.
        have: weights have gradients. sending: they are being moved into messages to replicas.
        part: what runs, if anything.
    """

    name: str
    activations: int
    losses: int
    have: bool
    sending: bool = False
    part: Part | None = None


def _held(work: Workload, weights: Iterable[Weight]) -> _Held:
    layout, full, shard, largest, persistent, gathered, maps, largest_map = work.layout, 0, 0, 0, 0, 0, 0, 0
    for weight in weights:
        local, single = weight.local(layout.tp, layout.ep), weight.local_largest(layout.tp, layout.ep)
        replicas = work.expert_replicas if weight.expert else work.replicas
        full += local
        shard += -(-local // replicas)
        largest = max(largest, single)
        if weight.matmul and weight.kind != "head":
            maps, largest_map = maps + local, max(largest_map, single)
        if replicas > 1 and single < zero_settings.PERSISTENT:
            persistent += local
        elif replicas > 1:
            gathered += local
    return _Held(full, shard, largest, persistent, gathered, maps, largest_map)


def rank_memory(work: Workload, pp_rank: int, device: str, whole: list[int] | None = None) -> Memory:
    """The fullest moment of a rank at place `pp_rank` of the pipeline; the other axes hold the same by symmetry.

    Args:
        device: "cpu" or "cuda"; decides which kernels run, and whether reduction overlaps backward.
        whole: bytes of the weights of every pipeline rank, uncut, where they were counted before.
    """
    parts = work.parts_of_rank(pp_rank)
    held = _held(work, (weight for part in parts for weight in trained_weights(work, part.layers)))
    if work.lora is not None:  # what ZeRO 3 brings together is the base above all
        held = replace(held, gathered=_base(work, parts).gathered)
    steady = _steady(work, held, parts, device)
    moments = [steady.at(moment) for moment in _passes(work, held, parts, pp_rank, device)]
    moments.append(steady.at(_update(work, held)))
    if work.copies:
        moments.append(steady.at(_gathering(work, parts, whole or _whole_weights(work))))
        moments.append(steady.at(Memory("sampling", buffers=work.copies.sampling)))
        moments.append(Memory("teacher answers", buffers=work.copies.before, host=steady.host))
    return max(moments, key=lambda memory: memory.total)


def _base(work: Workload, parts: list[Part]) -> _Held:
    """The weights that adapters are put on."""
    return _held(work, (weight for part in parts for weight in part_weights(work.model, part.layers)))


def _steady(work: Workload, held: _Held, parts: list[Part], device: str) -> Memory:
    zero, model = work.layout.zero_stage, work.model
    numbers = held.full if zero == 0 else held.shard
    optimizer = FP32 * ((work.moments + (zero > 0)) * numbers - (held.maps if work.muon and not work.equalises else 0))
    gradients, weights = 0, FP32 * held.full
    buffers = {
        "rotary table": len(parts) * 2 * FP32 * model.max_position_embeddings * model.rotary_dim // 2,
        "batch": BATCH * work.rows_per_replica * work.seq_len,
    }
    if zero == 3:
        weights = FP32 * (held.shard + held.persistent)
        gradients = FP32 * held.shard
        buffers["bucket"] = FP32 * zero_settings.reduce_bucket(held.full)
    if work.lora is not None:
        base = _base(work, parts)
        weights += FP32 * (base.shard + base.persistent if zero == 3 else base.full)
    if work.frozen is not None:
        frozen = _frozen_numbers(work, [part.stage for part in parts])
        weights += FP32 * frozen
    buffers |= work.copies.device
    host = dict(work.copies.host)
    if work.copies:
        host["checkpoint on its way"] = FP32 * (1 + work.moments) * held.shard
    if work.layout.offload_optimizer:  # and three copies of its gradients
        host["optimizer"], optimizer, gradients = optimizer + 3 * FP32 * held.shard, 0, 0
    return Memory("", weights, gradients, optimizer, 0, buffers, host)


def _frozen_numbers(work: Workload, stages: list[int]) -> int:
    """Weights of the reference or teacher on the same ranks; nothing that is only read is sharded by ZeRO."""
    assert work.frozen is not None
    parts = work.cut(work.frozen)
    weights = (weight for stage in stages for weight in part_weights(work.frozen, parts[stage].layers))
    return sum(weight.local(work.layout.tp, work.layout.ep) for weight in weights)


def _passes(work: Workload, held: _Held, parts: list[Part], pp_rank: int, device: str) -> Iterator[Memory]:
    """Every loss, and begin and end of every backward, deduplicated."""
    on, layout = kernels(device), work.layout
    by_stage = {part.stage: part for part in parts}
    size = {part.stage: part_bytes(work, on, part) for part in parts}
    # Once the pipeline is full, further micro-batches only repeat what was there.
    count = min(work.micro_batches, 4 * layout.pp)
    schedule = build_schedule(layout.schedule, layout.pp, count)
    sends = layout.zero_stage == 0 and work.replicas > 1 and not schedule.splits_backward
    live = losses = 0  # bytes of activations; micro-batches whose loss waits for its backward
    have = False
    seen = set()
    for action in schedule.actions[pp_rank]:
        part, found = by_stage[action.stage], []
        if action.kind == "F":
            live, losses = live + size[part.stage], losses + part.last
            found = [_Moment("loss", live, losses, have, part=part)] if part.last else []
        elif action.kind in ("B", "I"):
            found = [_Moment("backward", live, losses, have, sends and action.micro_batch == count - 1, part)]
        if action.kind in ("B", "W"):
            live, losses, have = live - size[part.stage], losses - part.last, True
            found.append(_Moment("backward", live, losses, have))
        for moment in found:
            if moment not in seen:
                seen.add(moment)
                yield from _filled(work, held, device, moment)


def _filled(work: Workload, held: _Held, device: str, moment: _Moment) -> Iterator[Memory]:
    """What is there at a moment, with each of the things that what runs may need for a while."""
    layout, part, on = work.layout, moment.part, kernels(device)
    # Offloaded, they gather in CPU memory.
    kept = 0 if layout.offload_optimizer else {0: held.full, 1: held.full, 2: held.shard, 3: 0}[layout.zero_stage]
    buffers = {key: moment.losses * size for key, size in kept_bytes(work).items()} | _messages(work)
    if moment.have:
        buffers |= _reducing(work, held, device)
    if moment.sending:
        buffers["message of gradients"] = _message_bytes(held)
    if layout.zero_stage == 3:
        buffers["gathered weights"] = FP32 * min(held.gathered, zero_settings.LIVE)
    needs: list[dict[str, int]] = [{}]
    if part is not None:
        loss = moment.name == "loss"
        needs = [forward_bytes(work, on)] if loss else _passing(work, held, on, part, moment.have)
    for need in needs:
        both = {key: buffers.get(key, 0) + need.get(key, 0) for key in buffers | need}
        yield Memory(moment.name, 0, FP32 * kept if moment.have else 0, 0, moment.activations, both)


def _passing(work: Workload, held: _Held, on: Kernels, part: Part, have: bool) -> list[dict[str, int]]:
    """What one backward needs besides what it finds, at each of its beginnings: the loss's, and the deepest layer's.

    Args:
        have: weights have gradients already, to which those of the head are added at once.
    """
    model, tokens, layout = work.model, work.tokens_at_once, work.layout
    layer = [*part.layers, *(model.mtp_layers if part.last and work.trains_mtp else ())][-1]
    again = 0
    if layout.activation_checkpointing != "none":
        fully = without_checkpointing(work)
        kept = [weight for weight in layer_weights(model, layer) if weight.matmul]
        if layout.activation_checkpointing == "selective":
            kept = [weight for weight in kept if weight.kind == "attention"]
        again = layer_bytes(fully, on, layer) - layer_bytes(work, on, layer) + cast_weights(work, kept)
    rows = tokens * (model.num_experts_per_tok if model.is_moe_layer(layer) else 1)
    flowing = 2 * rows * model.hidden_size * work.element + work.element * held.largest
    within = {"gradients in passing": flowing, "computed again": again}
    if not part.last:
        return [within]
    if have and not work.trains_mtp:  # else the head's gradients wait for those of its first use, or are the first
        within |= {name: -size for name, size in kept_bytes(work).items()}
    return [backward_bytes(work, on), within]


def _messages(work: Workload) -> dict[str, int]:
    """Pipeline: hidden states, and embeddings for later readers, one set coming in and one going out."""
    if work.layout.pp == 1:
        return {}
    tensors = 2 if work.model.hands_embeddings_on else 1
    return {"messages": 2 * tensors * work.tokens_at_once * work.model.hidden_size * FP32}


def _reducing(work: Workload, held: _Held, device: str) -> dict[str, int]:
    """DeepSpeed's bucket, two of them where reduction runs beside backward."""
    zero = work.layout.zero_stage
    if zero not in (1, 2):
        return {}
    buckets = 2 if zero == 2 and device == "cuda" else 1
    return {"bucket": buckets * FP32 * zero_settings.reduce_bucket(held.full)}


def _whole_weights(work: Workload) -> list[int]:
    """Bytes of the weights of every pipeline rank before any other axis cuts them."""
    return [
        FP32 * sum(w.count for part in work.parts_of_rank(rank) for w in part_weights(work.model, part.layers))
        for rank in range(work.layout.pp)
    ]


def _gathering(work: Workload, parts: list[Part], whole: list[int]) -> Memory:
    """The whole model is brought together to be evaluated; or tensor by tensor, to be saved."""
    layout, weights = work.layout, [w for part in parts for w in part_weights(work.model, part.layers)]
    own = sum(w.local(layout.tp, layout.ep) for w in weights)
    cut = layout.tp > 1 or layout.ep > 1
    if not work.copies.device:
        joined = 2 * FP32 * max(w.local_largest(1, layout.ep) for w in weights)  # slices, and what they are joined to
        size = joined + (FP32 * own if layout.zero_stage == 3 else 0)
        return Memory("gathering", buffers={"weights of other ranks": size})
    size = gathering_bytes(FP32 * own, whole, cut=cut, zero_3=layout.zero_stage == 3)
    return Memory("gathering", buffers={"weights of other ranks": size})


def _message_bytes(held: _Held) -> int:
    """ZeRO 0 moves gradients into messages, one after another, and lets go of what was moved."""
    return FP32 * min(held.full, max(zero_settings.MESSAGE, held.largest))


def _update(work: Workload, held: _Held) -> Memory:
    """Reduce, clip, step."""
    zero = work.layout.zero_stage
    gradients = FP32 * {0: held.full, 1: held.full, 2: held.shard, 3: 0}[zero]
    buffers: dict[str, int] = {}
    if zero == 0:
        buffers["message of gradients"] = _message_bytes(held) if work.replicas > 1 else 0
        buffers["squares of gradients"] = FP32 * held.largest if work.replicas == 1 else 0
    elif zero < 3:
        buffers["own share of the gradients"] = FP32 * held.shard
        if zero == 1:
            buffers |= {"bucket": FP32 * zero_settings.reduce_bucket(held.full)}
    if work.muon:  # what is orthogonalised, and two rounds of it
        buffers["orthogonalised momentum"] = 3 * FP32 * held.largest_map
    return Memory("update", 0, gradients, 0, 0, buffers)


def stage_memory(work: Workload, device: str) -> list[Memory]:
    """The fullest moment of every pipeline rank."""
    whole = _whole_weights(work)
    return [rank_memory(work, pp_rank, device, whole) for pp_rank in range(work.layout.pp)]

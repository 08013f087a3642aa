"""Expected time of a step: matrix products at the share of peak that training gets, messages at link speed, and the
schedule played with both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from ray_pipeline.costs.attention_costs import core_flops
from ray_pipeline.costs.hardware_table import Hardware
from ray_pipeline.costs.head_loss import computes_logits_again
from ray_pipeline.costs.kernels import kernels
from ray_pipeline.costs.traffic import Group, Traffic, boundary_bytes, gradient_traffic, groups, part_messages
from ray_pipeline.costs.weights import alike, layer_weights
from ray_pipeline.costs.workload import Part, Workload
from ray_pipeline.engine.pipeline.schedule import build_schedule
from ray_pipeline.engine.pipeline.schedule_simulation import Costs, simulate


@dataclass(frozen=True)
class Timing:
    """One optimizer step on given hardware.

    Attributes:
        seconds: the whole step. gradients: of them, after the last backward, for reduction among replicas.
        bubble: share of the pipeline's time that ranks idle, on average. mfu: model FLOPs over what peak could do.
        shares: what the busiest rank spends in computing and in messages that nothing hides, in seconds.
    """

    seconds: float
    gradients: float
    bubble: float
    mfu: float
    tokens_per_second: float
    shares: dict[str, float]


def flops_per_token(work: Workload) -> int:
    """Useful FLOPs of forward and backward per token: 6 per weight it is multiplied with, and causal attention."""
    model = work.model
    if not work.trains_mtp:
        model = replace(model, num_nextn_predict_layers=0)
    return model.flops_per_token(work.seq_len)


def part_flops(work: Workload, part: Part) -> tuple[int, int]:
    """What one rank computes for one micro-batch of a part: (forward, what is computed again in backward).

    With packed documents attention is computed under a mask, on a GPU over whole rows.
    """
    model, layout = work.model, work.layout
    ahead = model.mtp_layers if part.last and work.trains_mtp else range(0)
    layers = [*part.layers] * model.recursion_depth + [*ahead]
    scores = core_flops(work, kernels(layout.device))
    forward = again = 0
    for layer, number in alike(model, layers):
        products = {"attention": scores, "rest": 0}
        for weight in layer_weights(model, layer):
            kind = "attention" if weight.kind == "attention" else "rest"
            products[kind] += 2 * weight.active // (layout.tp if weight.tp else 1)
        repeated = {"none": 0, "selective": products["attention"], "full": sum(products.values())}
        forward += number * sum(products.values())
        again += number * repeated[layout.activation_checkpointing]
    if part.last:
        head = 2 * model.vocab_size * model.hidden_size // layout.tp
        forward += (1 + len(ahead)) * head + len(ahead) * 4 * model.hidden_size**2
        again += head if computes_logits_again(work) else 0
    return work.tokens_at_once * forward, work.tokens_at_once * again


def part_launches(work: Workload, part: Part) -> int:
    """Operations that Python starts for one micro-batch of a part, forward and backward; views are none.

    Counted in steps of the plain path on a CPU. Attention and what is around it 110, a dense feed-forward 40, routing
    and experts together 170, an MTP module's own 120, the loss 60; half as many again where all of forward is repeated.
    """
    model = work.model
    ahead = list(model.mtp_layers) if part.last and work.trains_mtp else []
    layers = [*part.layers] * model.recursion_depth + ahead
    count = sum(110 + (170 if model.is_moe_layer(layer) else 40) for layer in layers) + 120 * len(ahead)
    again = {"none": 1.0, "selective": 1.2, "full": 1.4}[work.layout.activation_checkpointing]
    return int(count * again) + 60 * part.last


@dataclass(frozen=True)
class _PartTimes:
    """Seconds of one micro-batch: computing and messages of every part, forward and backward of all parts together."""

    computing: list[float]
    talking: list[float]
    forward: float
    backward: float


def _part_times(work: Workload, hardware: Hardware) -> _PartTimes:
    speed = hardware.peak(work.bf16) * hardware.achieved
    sizes = groups(work)
    computing, talking, forward_total, backward_total = [], [], 0.0, 0.0
    for part in work.parts:
        forward, again = part_flops(work, part)
        messages = part_messages(work, part)
        sent = [
            sum(sizes[axis].seconds(both[i], hardware, ring=axis == "tp") for axis, both in messages.items())
            for i in (0, 1)
        ]
        # A device is done no sooner than Python has started what it does.
        slower = max(1.0, part_launches(work, part) * hardware.launch * speed / (3 * forward + again))
        computing.append(slower * (3 * forward + again) / speed)
        talking.append(sum(sent))
        forward_total += slower * forward / speed + sent[0]
        backward_total += slower * (2 * forward + again) / speed + sent[1]
    return _PartTimes(computing, talking, forward_total, backward_total)


def mean_work(work: Workload, hardware: Hardware) -> float:
    """What a rank computes and sends within layers in a step on average: no schedule makes a step shorter."""
    times = _part_times(work, hardware)
    return work.micro_batches * (sum(times.computing) + sum(times.talking)) / work.layout.pp


def least_seconds(work: Workload, hardware: Hardware, *, reduces: bool = True) -> float:
    """What a step takes at least, without playing its schedule: the work of the busiest rank, and what reduction adds.

    Under 1f1b the first micro-batch has to come to that rank through those before it, and its gradients go back.
    """
    times, pp = _part_times(work, hardware), work.layout.pp
    whole = [computing + talking for computing, talking in zip(times.computing, times.talking, strict=True)]
    busy = [work.micro_batches * sum(whole[part.stage] for part in work.parts_of_rank(rank)) for rank in range(pp)]
    way = [0.0, *accumulate(whole)] if work.layout.schedule == "1f1b" else [0.0] * pp
    longest = max(busy[rank] + way[rank] for rank in range(pp))
    return longest + (_gradient_seconds(work, hardware, busy) if reduces else 0.0)


def step_timing(work: Workload, hardware: Hardware) -> Timing:
    """Play the step on `hardware`, which is what one rank has."""
    layout, sizes, times = work.layout, groups(work), _part_times(work, hardware)
    computing, talking = times.computing, times.talking
    ratio = times.backward / times.forward
    whole = [(c + t) / (1 + ratio) for c, t in zip(computing, talking, strict=True)]
    message = sizes["pp"].seconds(boundary_bytes(work), hardware, ring=True) if layout.pp > 1 else 0.0
    finish, busy = _play(work, Costs(1, ratio, ratio / 2, ratio / 2, message, tuple(whole)))
    busiest = max(range(layout.pp), key=lambda rank: busy[rank])
    gradients = _gradient_seconds(work, hardware, busy)
    seconds = finish + gradients
    held = [part.stage for part in work.parts_of_rank(busiest)]
    m = work.micro_batches
    useful = flops_per_token(work) * work.tokens_per_step
    return Timing(
        seconds,
        gradients,
        bubble=1 - sum(busy) / layout.pp / finish,
        mfu=useful / (seconds * layout.gpus * hardware.peak(work.bf16)),
        tokens_per_second=work.tokens_per_step / seconds,
        shares={
            "computing": m * sum(computing[stage] for stage in held),
            "messages within layers": m * sum(talking[stage] for stage in held),
            "idle in the pipeline": finish - busy[busiest],
            "gradients and weights among replicas": gradients,
        },
    )


def _play(work: Workload, costs: Costs) -> tuple[float, list[float]]:
    """When the pipeline is done, and how long each rank computes.

    Once a pipeline is full every further round of micro-batches takes as long as the last one, so of many only the
    first few rounds are played.
    """
    name, pp, m = work.layout.schedule, work.layout.pp, work.micro_batches
    most = 8 * pp
    played = simulate(build_schedule(name, pp, min(m, most)), costs)
    finish, busy = float(played.finish), [float(time) for time in played.busy]
    if m > most:
        before = float(simulate(build_schedule(name, pp, most // 2), costs).finish)
        finish += (finish - before) / (most // 2) * (m - most)
        busy = [time * m / most for time in busy]
    return finish, busy


def _gradient_seconds(work: Workload, hardware: Hardware, busy: list[float]) -> float:
    """What reduction adds to the step: part of it runs beside backward, which is two thirds of the computing.

    ZeRO 0 has the last micro-batch's to hide behind, ZeRO 2 and 3 all of them where there are streams, ZeRO 1 none.
    """
    sizes, longest = groups(work), 0.0
    for rank in range(work.layout.pp):
        exposed = sum(message_seconds(message, sizes, hardware) for message in gradient_traffic(work, rank))
        if work.layout.zero_stage == 0:
            exposed -= busy[rank] * 2 / 3 / work.micro_batches
        elif work.layout.zero_stage >= 2 and hardware.device == "cuda":
            exposed -= busy[rank] * 2 / 3
        longest = max(longest, exposed)
    return longest


def message_seconds(message: Traffic, sizes: dict[str, Group], hardware: Hardware) -> float:
    """Time of all of a step's messages of one kind."""
    group = sizes[message.axis]
    if message.axis == "pp":
        return group.seconds(message.bytes, hardware, ring=True)
    return group.seconds(message.bytes, hardware, ring=message.operation != "all-to-all")

"""Which layers live on which pipeline stage, and which stages on which rank. Integers only; does not import torch.

A stage is one consecutive part of the model. 1F1B gives a rank one of them, the other schedules two: interleaved 1F1B
goes around the ranks twice, the V-shaped ones (zbv, dualpipev) go up and come back down, so that the first and the
last stage share rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from model.config import ModelConfig

PARTS_PER_RANK = {"1f1b": 1, "interleaved_1f1b": 2, "zbv": 2, "dualpipev": 2}
V_SHAPED = ("zbv", "dualpipev")


def num_stages(schedule: str, pp: int) -> int:
    """Model parts of all pipeline ranks together."""
    return PARTS_PER_RANK[schedule] * pp


def parts_of(schedule: str, pp: int, pp_rank: int) -> list[int]:
    """Stages that pipeline rank `pp_rank` holds, ascending; their places in this list are the local part indices."""
    if schedule in V_SHAPED:
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return list(range(pp_rank, num_stages(schedule, pp), pp))


def ranks_of(schedule: str, pp: int) -> tuple[int, ...]:
    """Pipeline rank of every stage, first to last."""
    held = {stage: rank for rank in range(pp) for stage in parts_of(schedule, pp, rank)}
    return tuple(held[stage] for stage in range(len(held)))


def stage_layers(config: ModelConfig, stages: int, pp_layout: str | None = None) -> list[range]:
    """Layers of each pipeline stage, first to last; the first also has the embedding, the last head and MTP modules.

    Args:
        pp_layout: layers per stage set by hand, "E+4|4|4+H"; by default the costliest stage costs as little as it can.
    Raises:
        ValueError: more stages than layers, or a `pp_layout` that does not fit.
    """
    if not 1 <= stages <= config.num_hidden_layers:
        raise ValueError(
            f"{stages} pipeline stages: the model has num_hidden_layers={config.num_hidden_layers} and every stage "
            f"needs a layer. Use at most {config.num_hidden_layers} stages (smaller --pp-size, or --schedule 1f1b)."
        )
    if pp_layout is None:
        return balance(layer_costs(config), stages)
    return _ranges(_parse_layout(pp_layout, stages, config.num_hidden_layers))


def layers_by_hand(pp_layout: str | None, main: ModelConfig, model: ModelConfig) -> str | None:
    """What of a `pp_layout`, which is written for `main`, holds for `model`: all of it, or nothing where it has another
    number of layers, as a student or a given teacher may; that one is balanced."""
    return pp_layout if model.num_hidden_layers == main.num_hidden_layers else None


def layer_costs(config: ModelConfig) -> list[int]:
    """What a token costs in each layer, in weights it passes through; ends of the model count with their layer.

    The embedding is a look-up that copies one row, so it counts hidden_size; head and MTP modules count in full.
    """
    costs = [config.layer_params(layer, active=True) for layer in range(config.num_hidden_layers)]
    costs[0] += config.hidden_size
    costs[-1] += config.tail_params()
    return costs


def balance(costs: Sequence[int], stages: int) -> list[range]:
    """Cut layers into `stages` consecutive, non-empty runs so that the costliest run costs least.

    Among the cuts with that optimum, the one with the least sum of squares is taken: the most even one.
    """
    assert 1 <= stages <= len(costs)
    worst = _cheapest_cuts(costs, stages, max)[0]
    counts = _cheapest_cuts(costs, stages, lambda so_far, run: so_far + run * run, limit=worst)[1]
    return _ranges(counts)


def _cheapest_cuts(
    costs: Sequence[int], stages: int, combine: Callable[[int, int], int], limit: int | None = None
) -> tuple[int, list[int]]:
    """Dynamic programming over (layers placed, stages used): the least value, and the layers per stage that give it.

    Args:
        combine: value of the runs so far and the cost of one more run -> value with that run; monotone in the former.
        limit: no run may cost more.
    """
    total = [0, *accumulate(costs)]
    layers = len(costs)
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for stage in range(stages):
        reached: dict[int, tuple[int, list[int]]] = {}
        for stop in range(stage + 1, layers - (stages - stage - 1) + 1):
            for start, (value, counts) in best.items():
                run = total[stop] - total[start]
                if start >= stop or (limit is not None and run > limit):
                    continue
                candidate = combine(value, run)
                if stop not in reached or candidate < reached[stop][0]:
                    reached[stop] = (candidate, [*counts, stop - start])
        best = reached
    return best[layers]


def _ranges(counts: Sequence[int]) -> list[range]:
    stops = list(accumulate(counts))
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def _parse_layout(text: str, stages: int, layers: int) -> list[int]:
    """Layers per stage of "E+4|4|4+H"; E (embedding) and H (head and MTP modules) may be left out.

    Raises:
        ValueError: not of this form, not `stages` parts, or not `layers` layers in all.
    """
    parts = text.replace(" ", "").split("|")
    example = f"for example --pp-layout {_example(stages, layers)}"
    if len(parts) != stages:
        raise ValueError(
            f"pp_layout={text!r}: {len(parts)} part{'s' if len(parts) != 1 else ''} for {stages} pipeline stages "
            f"(pp_size x stages per rank). Give one number of layers per stage, {example}."
        )
    counts = [_parse_part(text, part, index, stages, example) for index, part in enumerate(parts)]
    if sum(counts) != layers:
        raise ValueError(
            f"pp_layout={text!r}: adds up to {sum(counts)} layers, but the model has num_hidden_layers={layers}. "
            f"Make the numbers add up to {layers}, {example}."
        )
    return counts


def _parse_part(text: str, part: str, index: int, stages: int, example: str) -> int:
    terms = part.upper().split("+")
    for mark, place, where in (("E", 0, "first"), ("H", stages - 1, "last")):
        if mark in terms:
            if index != place:
                named = "the embedding" if mark == "E" else "the head"
                raise ValueError(
                    f"pp_layout={text!r}: {mark} in part {index + 1}, but {named} belongs to the {where} stage. "
                    f"Put {mark} into the {where} part or omit it, {example}."
                )
            terms.remove(mark)
    if len(terms) != 1 or not (terms[0].isascii() and terms[0].isdigit()) or int(terms[0]) < 1:
        raise ValueError(
            f"pp_layout={text!r}: part {index + 1} ({part!r}) is not a number of layers of at least 1. "
            f"Separate stages with '|', {example}."
        )
    return int(terms[0])


def _example(stages: int, layers: int) -> str:
    size, extra = divmod(layers, stages)
    return '"E+' + "|".join(str(size + (stage < extra)) for stage in range(stages)) + '+H"'

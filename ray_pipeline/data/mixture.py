"""How much of each source goes into the training text. Sizes in, choices out."""

from __future__ import annotations

from collections.abc import Sequence


def mixture_members(sources: Sequence[int], sizes: Sequence[int], weights: Sequence[float]) -> list[bool]:
    """Which documents to keep so that each source has its share of the bytes.

    The source that is scarcest for its weight is kept whole; of the others the first documents are kept until their
    share is reached. Nothing is repeated. One source is always kept whole.

    Args:
        sources: index of each document's source. sizes: its bytes. weights: of each source, in any unit.
    """
    held = [0] * len(weights)
    for source, size in zip(sources, sizes, strict=True):
        held[source] += size
    present = [i for i, size in enumerate(held) if size]
    if not present:
        return [False] * len(sources)
    # Bytes per unit of weight that the scarcest source can pay.
    scarcest = min(present, key=lambda i: held[i] / weights[i])
    unit = held[scarcest] / weights[scarcest]
    left = [unit * weight for weight in weights]
    left[scarcest] = float("inf")  # whole, whatever rounding says
    out = []
    for source, size in zip(sources, sizes, strict=True):
        out.append(left[source] > 0)
        left[source] -= size
    return out

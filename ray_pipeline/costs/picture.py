"""Which rank sits where, as a grid of short texts: pipeline ranks down, replicas across, tp peers in a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_pipeline.costs.workload import Workload

MOST_COLUMNS, MOST_ROWS = 8, 18
GAP = "…"


@dataclass(frozen=True)
class RankMap:
    """The grid as texts.

    Attributes:
        columns: a header per shown replica, or `GAP`. rows: (header, a cell per column) per shown pipeline rank.
    """

    columns: list[str]
    rows: list[tuple[str, list[str]]]


def _shown(count: int, most: int) -> list[int | None]:
    """The first and the last of a long row of indices, with None for those left out."""
    if count <= most:
        return list(range(count))
    last = 2 if most > 4 else 1
    return [*range(most - last - 1), None, *range(count - last, count)]


def ranks_text(ranks: Sequence[int]) -> str:
    """`4`, `4 5` or `4-11`."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return " ".join(map(str, ranks))


def placement(work: Workload) -> list[str]:
    """Layers of every pipeline rank, as `--pp-layout` writes them: `E+4`, `4`, `4+H`; two parts with "&"."""
    return [" & ".join(part.text() for part in work.parts_of_rank(rank)) for rank in range(work.layout.pp)]


def pp_layout_text(work: Workload) -> str:
    """All parts in one, to copy into `--pp-layout`: `E+4|4|4+H`."""
    return "|".join(part.text() for part in work.parts)


def rank_map(work: Workload) -> RankMap:
    """The grid (pp, dp, sp, tp), tp fastest; experts are cut over neighbouring replicas."""
    layout, held = work.layout, placement(work)
    columns = _shown(work.replicas, MOST_COLUMNS)
    rows = []
    for pp_rank in _shown(layout.pp, MOST_ROWS):
        if pp_rank is None:
            rows.append((GAP, [GAP] * len(columns)))
            continue
        cells = []
        for replica in columns:
            first = (pp_rank * work.replicas + (replica or 0)) * layout.tp
            cells.append(GAP if replica is None else ranks_text(range(first, first + layout.tp)))
        header = f"pp {pp_rank}" if layout.pp > 1 else "all"
        rows.append((f"{header}  {held[pp_rank]}", cells))
    return RankMap([GAP if column is None else _replica_text(work, column) for column in columns], rows)


def _replica_text(work: Workload, replica: int) -> str:
    """`dp 0 sp 1` and, with expert parallelism, the experts that its ranks hold."""
    layout = work.layout
    dp, sp = divmod(replica, layout.sp)
    lines = [f"dp {dp}" + (f" sp {sp}" if layout.sp > 1 else "")]
    if layout.ep > 1:
        each = work.model.n_routed_experts // layout.ep
        first = replica % layout.ep * each
        lines.append(f"experts {ranks_text(range(first, first + each))}")
    return "\n".join(lines)

"""Ranks on the map are where the mesh puts them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.parallel.mesh import MeshSizes
from ray_pipeline.costs.picture import GAP, MOST_COLUMNS, MOST_ROWS, placement, pp_layout_text, rank_map, ranks_text
from ray_pipeline.costs.workload import Workload
from ray_pipeline.layout.layout import Layout

MODEL = ModelConfig(num_hidden_layers=64, n_routed_experts=64)


def work(schedule: str = "1f1b", **sizes: int) -> Workload:
    mesh = MeshSizes(**sizes)
    return Workload("pretrain", MODEL, Layout(gpus=mesh.world, schedule=schedule, **sizes), 1, 8, 1, 1)


SIZES = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in ("pp", "dp", "sp", "tp")})


@given(SIZES)
def test_every_shown_rank_stands_at_its_coordinate(sizes: dict[str, int]) -> None:
    mesh, grid = MeshSizes(**sizes), rank_map(work(**sizes))
    for pp_rank, (_, cells) in enumerate(grid.rows):
        for column, cell in zip(grid.columns, cells, strict=True):
            if cell == GAP:
                continue
            words = column.split()
            at = {"pp": pp_rank, "dp": int(words[1]), "sp": int(words[3]) if len(words) > 2 else 0}
            assert cell == ranks_text([mesh.rank(at | {"tp": tp}) for tp in range(mesh.tp)])


@given(st.sampled_from([1, 2, 4, 8]))
def test_replicas_hold_the_experts_of_their_group(ep: int) -> None:
    mesh, columns = MeshSizes(dp=8, ep=ep), rank_map(work(dp=8, ep=ep)).columns
    each = MODEL.n_routed_experts // ep
    for group in mesh.expert_groups() if ep > 1 else []:
        for index, rank in enumerate(group):
            assert columns[rank].endswith(ranks_text(range(index * each, (index + 1) * each)))


def test_many_ranks_are_abbreviated() -> None:
    grid = rank_map(work(pp=32, dp=128, tp=8))
    assert len(grid.columns) == MOST_COLUMNS and GAP in grid.columns
    assert len(grid.rows) == MOST_ROWS and grid.rows[-1][1][-1] == "32760-32767"


def test_layers_are_written_as_pp_layout_takes_them() -> None:
    again = work(pp=4)
    text = pp_layout_text(again)
    assert text.startswith("E+") and text.endswith("+H")
    assert placement(again) == text.split("|")
    assert placement(work("zbv", pp=2))[0].startswith("E+") and placement(work("zbv", pp=2))[0].endswith("+H")

"""Ranks, coordinates and groups, as integers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.parallel.mesh import AXES, Mesh, MeshSizes, split_layers

sizes = st.builds(MeshSizes, pp=st.integers(1, 4), dp=st.integers(1, 4), sp=st.integers(1, 3), tp=st.integers(1, 3))


@given(sizes)
def test_rank_and_coordinate_are_inverse(size):
    places = [size.coordinate(rank) for rank in range(size.world)]
    assert [size.rank(place) for place in places] == list(range(size.world))
    assert len({tuple(place.values()) for place in places}) == size.world


@given(sizes, st.sets(st.sampled_from(AXES), min_size=1))
def test_groups_partition_the_world(size, axes):
    groups = size.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(size.world))
    for group in groups:
        fixed = {tuple(size.coordinate(r)[a] for a in AXES if a not in axes) for r in group}
        assert len(fixed) == 1


@given(st.data())
def test_layers_are_split_without_loss_and_no_single_move_helps(data):
    stages = data.draw(st.integers(1, 8))
    layers = data.draw(st.integers(stages, 70))
    tail = data.draw(st.floats(0, 6))
    split = split_layers(layers, stages, tail)
    assert [i for part in split for i in part] == list(range(layers))
    assert all(len(part) >= 1 for part in split)
    cost = [len(part) + (tail if i == stages - 1 else 0) for i, part in enumerate(split)]
    if stages > 1 and len(split[-1]) > 1:
        assert max(max(cost[:-1]) , cost[-1]) <= max(min(cost[:-1]) + 1, cost[-1] - 1) + 1


def test_a_layout_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="layout of 2 ranks .* started with 1 processes"):
        Mesh(MeshSizes(pp=2))

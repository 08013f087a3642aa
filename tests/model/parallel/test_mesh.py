"""Ranks, coordinates and groups, as integers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.parallel.mesh import AXES, Mesh, MeshSizes

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


def test_a_layout_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="layout of 2 ranks .* started with 1 processes"):
        Mesh(MeshSizes(pp=2))

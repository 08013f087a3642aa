"""Ranks, coordinates and groups, as integers."""

from __future__ import annotations

from dataclasses import replace

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


@given(sizes, st.integers(1, 4), st.none() | st.integers(1, 8))
def test_the_steps_to_experts_lead_from_everybody_to_every_expert(size, ep, node):
    size = replace(size, ep=ep if size.replicas % ep == 0 else 1)
    groups = {name: {rank: ranks for ranks in some for rank in ranks} for name, some in size.all_groups(node).items()}
    near, far = size.dispatch_sizes(node)
    for rank in range(size.world):
        assert len(groups["ep_near"][rank]) == near and len(groups["ep_far"][rank]) == far
        there = {last for middle in groups["ep_far"][rank] for last in groups["ep_near"][middle]}
        peers = [peer for other in groups["ep"][rank] for peer in groups["tp"][other]]
        assert there == set(peers if size.ep > 1 else [rank])
        if far > 1:  # no message of the first step stays on a node, none of the second leaves it
            assert len({peer // node for peer in groups["ep_far"][rank]}) == far
            assert {peer // node for peer in groups["ep_near"][rank]} == {rank // node}


def test_a_layout_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="layout of 2 ranks .* started with 1 processes"):
        Mesh(MeshSizes(pp=2))

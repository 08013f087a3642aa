"""Slices and places: whatever cut wrote a checkpoint, any other cut finds its own slices in it."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from model.parallel.collectives import Axis
from model.parallel.mesh import MeshSizes
from model.parallel.shard_plan import cut, shard_of
from model.transformer import Transformer
from ray_pipeline.engine.checkpoints.checkpoint_format import (
    cut_dims,
    global_shape,
    loaded,
    my_share,
    shape_differences,
    shares,
    stored,
)
from tests.engine.test_parity import CONFIG

NAMES = sorted(name for name, _ in Transformer(CONFIG).named_parameters())
KEYS = st.tuples(st.sampled_from(["model", "exp_avg", "exp_avg_sq"]), st.sampled_from(NAMES)).map(".".join)
SIZES = st.sampled_from([1, 2, 3, 4])


def window(key: str, shape: torch.Size, index: dict[str, int], sizes: dict[str, int]) -> tuple[slice, ...]:
    """Where the file's tensor of this shape holds a rank's slice."""
    out = [slice(None)] * len(shape)
    for axis, dim in cut_dims(key).items():
        part = shape[dim] // sizes[axis]
        out[dim] = slice(index[axis] * part, (index[axis] + 1) * part)
    return tuple(out)


def whole(name: str) -> torch.Tensor:
    shard, shape = shard_of(name), [12, 24, 36][: 3 if shard_of(name).expert else 2]
    if shard.tp_dim is None and not shard.expert:
        shape = [5]
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@given(KEYS, SIZES, SIZES, SIZES, SIZES)
def test_what_one_cut_wrote_another_cut_reads(key, tp, ep, other_tp, other_ep):
    name = key.partition(".")[2]
    full, shard = whole(name), shard_of(name)
    file = torch.full_like(stored(key, full), -1)
    for t in range(tp):
        for e in range(ep):
            local = stored(key, cut(full, shard, tp=(t, tp), ep=(e, ep)))
            assert global_shape(key, local, {"tp": tp, "ep": ep}) == tuple(file.shape)
            file[window(key, file.shape, {"tp": t, "ep": e}, {"tp": tp, "ep": ep})] = local
    assert torch.equal(loaded(key, file), full)
    for t in range(other_tp):
        for e in range(other_ep):
            read = file[window(key, file.shape, {"tp": t, "ep": e}, {"tp": other_tp, "ep": other_ep})]
            expected = cut(full, shard, tp=(t, other_tp), ep=(e, other_ep))
            assert torch.equal(loaded(key, read), expected)


class AnyRank:
    """A rank's axes without processes."""

    def __init__(self, sizes: MeshSizes, rank: int):
        self.rank = rank
        self._axes = {
            name: Axis(name, tuple(ranks), ranks.index(rank))
            for name, groups in sizes.all_groups().items()
            for ranks in groups
            if rank in ranks
        }

    def axis(self, name: str) -> Axis:
        return self._axes[name]


@given(st.data())
def test_every_slice_is_written_by_exactly_one_rank(data):
    dp, sp, tp, ep = (data.draw(SIZES) for _ in range(4))
    assume((dp * sp) % ep == 0)
    sizes = MeshSizes(dp=dp, sp=sp, tp=tp, ep=ep)
    chosen = data.draw(st.lists(KEYS, unique=True, max_size=12))
    keys = dict.fromkeys(["step", *chosen], 4) | {key: data.draw(st.integers(1, 99)) for key in chosen}
    written, expected = [], []
    for rank in range(sizes.world):
        mesh = AnyRank(sizes, rank)

        def slice_of(key: str, mesh: AnyRank = mesh) -> tuple[str, tuple[int, ...]]:
            return key, () if key == "step" else tuple(mesh.axis(axis).index for axis in cut_dims(key))

        written += [slice_of(key) for key in my_share(keys, mesh)]
        expected += [slice_of(key) for key in keys]
    assert sorted(written) == sorted(set(expected))


@given(st.dictionaries(st.text(max_size=4), st.integers(1, 100), max_size=30), st.integers(1, 5))
def test_ranks_that_hold_the_same_write_about_as_much(sizes, count):
    found = shares(sizes, count)
    loads = [sum(sizes[name] for name, to in found.items() if to == rank) for rank in range(count)]
    assert found.keys() == sizes.keys()
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def test_absent_and_differently_shaped_tensors_are_named():
    there = {"model.a": (2, 3), "model.b": (4,)}
    assert shape_differences(there, {"model.a": (2, 3)}) == []
    assert shape_differences(there, {"model.b": (5,), "model.c": (1,)}) == [
        "model.b is [4] there and [5] here",
        "model.c is not in it",
    ]

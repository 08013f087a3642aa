"""Answers sampled in the training ranks: the same for the same shares, by weights that are checked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.records.artifacts import weights_digest
from ray_pipeline.rollouts.samplers import InRankEngine, from_main, share_rows, shares, synchronise
from ray_pipeline.rollouts.teams import each_alone
from tests.distributed import run_ranks
from tests.rollouts.samplers import builder, requests, tokenizer_folder, weights

__all__ = ["tokenizer_folder"]


class Deaf:
    """A sampler that keeps the first weights it was given."""

    def __init__(self) -> None:
        self.held = None

    def take(self, state):
        self.held = self.held or dict(state)
        return weights_digest(self.held)

    def sample(self, requests):
        raise AssertionError("nobody samples with other weights")


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_hold_every_request_once_in_order(count, rows):
    asked = requests(count)
    cut = shares(asked, rows)
    assert [r for share in cut for r in share] == asked
    assert all(len(share) == rows for share in cut[:-1]) and all(cut)


def test_a_sampler_that_missed_a_synchronisation_raises_the_alarm_with_both_checksums():
    engine = InRankEngine(each_alone(Mesh(MeshSizes())), Deaf(), 4)
    synchronise(engine, weights(1), 0)
    with pytest.raises(StageFailed) as caught:
        synchronise(engine, weights(2), 1)
    said = str(caught.value)
    assert "after synchronisation 1" in said
    assert weights_digest(weights(1)) in said and weights_digest(weights(2)) in said


@given(st.integers(1, 5000), st.integers(1, 64))
def test_every_sampler_has_a_share_worth_having(answers, samplers):
    rows = share_rows(answers, samplers)
    cut = [len(part) for part in shares(range(answers), rows)]
    assert sum(cut) == answers and all(part == rows for part in cut[:-1]) and 64 <= rows <= 256
    if 64 <= answers / samplers <= 256:
        assert -(-answers // rows) <= samplers, "nobody works twice while others wait"
    if rows < 256:
        assert rows * samplers >= answers or rows == 64


def in_two_ranks(rank: int, folder) -> list:
    mesh = Mesh(MeshSizes(dp=2))
    assert from_main(mesh, lambda: rank) == 0

    def refuse() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        from_main(mesh, refuse)
    return sampled_in_ranks(rank, 2, folder)


def sampled_in_ranks(rank: int, world: int, folder) -> list:
    torch.set_num_threads(1)
    engine = InRankEngine(each_alone(Mesh(MeshSizes(dp=world))), builder(folder)(), share_rows=4)
    synchronise(engine, weights(3), 0)
    answers = engine.collect(engine.submit(requests(14)))
    return [(answer, answer.routing) for answer in answers]


def same(found: list, expected: list) -> None:
    """Bit for bit, recorded experts too."""
    assert [answer for answer, _ in found] == [answer for answer, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_two_ranks_sample_what_one_does_bit_for_bit_and_what_fails_on_rank_0_fails_on_both(tokenizer_folder):
    one = sampled_in_ranks(0, 1, tokenizer_folder)
    assert len({tuple(answer.tokens) for answer, _ in one}) == 14
    first, second = run_ranks(in_two_ranks, 2, tokenizer_folder)
    same(first, one)
    same(second, one)

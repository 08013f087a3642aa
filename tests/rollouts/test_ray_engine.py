"""Samplers as Ray actors: the answers of the ranks' own, whatever becomes of the actors."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.errors import StageFailed
from ray_pipeline.launch.local_ray import start_ray
from ray_pipeline.records.artifacts import weights_digest
from ray_pipeline.rollouts.ray_engine import RayEngine, SamplingActor
from ray_pipeline.rollouts.samplers import InRankEngine, synchronise
from ray_pipeline.rollouts.teams import each_alone
from tests.rollouts.samplers import builder, requests, tokenizer_folder, weights
from tests.rollouts.test_samplers import same

__all__ = ["tokenizer_folder"]
pytestmark = pytest.mark.slow
COUNT, ROWS = 14, 4
MARK = "struck"


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    import ray

    start_ray(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


class Inattentive(SamplingActor):
    """Skips the second synchronisation, as one that was lost would."""

    def take(self, weights, version):
        if version != 1:
            return super().take(weights, version)
        self.version = version
        return weights_digest(self.sampler.model.state_dict())


class Torn(SamplingActor):
    """Gets the first half of the second weights."""

    def take(self, weights, version):
        if version == 1:
            held = {name: tensor.numpy() for name, tensor in self.sampler.model.state_dict().items()}
            half = sorted(weights)[: len(weights) // 2]
            weights = {name: weights[name] if name in half else held[name].copy() for name in weights}
        return super().take(weights, version)


class Mortal(SamplingActor):
    """Dies in its first share where there is no mark; the mark, beside the tokenizer, outlives it."""

    def __init__(self, build, threads):
        super().__init__(build, threads)
        self.mark = build.args[1] / MARK

    def sample(self, requests, version):
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(requests, version)


class Doomed(SamplingActor):
    """Never gets through a share."""

    def sample(self, requests, version):
        os.kill(os.getpid(), signal.SIGKILL)


def actors(folder, workers: int, actor: type[SamplingActor] = SamplingActor) -> RayEngine:
    return RayEngine(Mesh(MeshSizes()), builder(folder), workers=workers, share_rows=ROWS, threads=1, actor=actor)


def answers(engine) -> list:
    return [(answer, answer.routing) for answer in engine.collect(engine.submit(requests(COUNT)))]


@pytest.fixture(scope="module")
def expected(tokenizer_folder) -> list:
    engine = InRankEngine(each_alone(Mesh(MeshSizes())), builder(tokenizer_folder)(), ROWS)
    synchronise(engine, weights(3), 0)
    return answers(engine)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_actors_sample_what_the_ranks_do_bit_for_bit(tokenizer_folder, expected, workers):
    engine = actors(tokenizer_folder, workers)
    synchronise(engine, weights(4), 0)
    assert answers(engine) != expected
    synchronise(engine, weights(3), 1)
    same(answers(engine), expected)
    engine.close()


@pytest.mark.parametrize("actor", [Inattentive, Torn])
def test_a_skipped_or_torn_synchronisation_raises_the_alarm_with_both_checksums(tokenizer_folder, actor):
    engine = actors(tokenizer_folder, 2, actor)
    synchronise(engine, weights(1), 0)
    with pytest.raises(StageFailed, match="after synchronisation 1") as caught:
        synchronise(engine, weights(2), 1)
    assert weights_digest(weights(2)) in str(caught.value)
    assert (weights_digest(weights(1)) in str(caught.value)) == (actor is Inattentive)
    engine.close()


def test_an_actor_that_dies_is_replaced_and_its_shares_are_sampled_again(tokenizer_folder, expected):
    engine = actors(tokenizer_folder, 2, Mortal)
    synchronise(engine, weights(3), 0)
    same(answers(engine), expected)
    assert (tokenizer_folder / MARK).exists() and engine._deaths == 1
    same(answers(engine), expected)
    engine.close()


def test_actors_that_all_die_end_the_stage(tokenizer_folder):
    engine = actors(tokenizer_folder, 2, Doomed)
    synchronise(engine, weights(3), 0)
    with pytest.raises(StageFailed, match="rollout actors died 4 times since weights 0"):
        answers(engine)
    engine.close()

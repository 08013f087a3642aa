"""Rollouts become batches, and a run that is broken between two of them goes on exactly."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_pipeline.data.rows.batch import IGNORE, Batch
from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import weights_digest
from ray_pipeline.training.grpo.rollout_source import RolloutSource
from tests.training.grpo_run import arguments, opened, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("grpo"))


def trained(folder: Path, name: str, stop: int | None = None, **settings: Any) -> tuple[str, list[dict[str, float]]]:
    """Digest of the weights after a run to its end, or up to `stop`; and what was measured of each step."""
    with opened(arguments(folder, name, **settings)) as (_, source, trainer):
        measured: list[dict[str, float]] = []
        step, metrics = trainer.engine.train_step, source.metrics

        def limited(*given):
            if stop is not None and int(trainer.engine.state()["step"]) >= stop:
                raise KeyboardInterrupt
            return step(*given)

        trainer.engine.train_step = limited  # type: ignore[method-assign]
        source.metrics = lambda: measured.append(metrics()) or measured[-1]  # type: ignore[method-assign,func-returns-value]
        with contextlib.suppress(KeyboardInterrupt):
            trainer.fit(source, dict)
        return weights_digest(trainer.engine.full_state()), measured


def test_the_sampler_and_the_trainer_agree_and_the_ratio_of_a_single_update_is_1(folder):
    _, measured = trained(folder, "agree", steps=2)
    for figures in measured:
        assert figures["sampler_gap_max"] < 1e-5 and figures["sampler_gap_far"] == 0.0
        assert figures["sampler_kl"] < 1e-9
    with opened(arguments(folder, "agree2")) as (_, source, _):
        batch = source.batch(0)
        assert batch.extras.old_logprobs is None
        assert bool((batch.extras.routing[batch.labels != IGNORE] >= 0).all())


def test_several_iterations_hold_the_ratio_to_the_trainers_own_log_probabilities(folder):
    with opened(arguments(folder, "several", num_iterations=2)) as (_, source, trainer):
        batch = source.batch(0)
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(batch.extras.old_logprobs, batch.extras.sampler_logprobs, **close)
        old = batch.extras.old_logprobs.clone()
        trainer.engine.train_step(batch, trainer.objective, 1e-2)
        assert source.batch(1) is batch and torch.equal(batch.extras.old_logprobs, old)
        source.batch(2)
        figures = source.metrics()
        assert figures["sampler_gap_max"] < 1e-5, "of the first batch; the second is not trained yet"


def answers_of(batches: list[Batch | None]) -> list[tuple[int, ...]]:
    """Tokens of each answer with its prompt, and its advantage."""
    found = []
    for batch in filter(None, batches):
        for row in range(len(batch)):
            for document in batch.doc_ids[row].unique().tolist():
                inside = batch.doc_ids[row] == document
                if (batch.labels[row, inside] != IGNORE).any():
                    advantages = batch.extras.advantages[row, inside]
                    found.append((*batch.tokens[row, inside].tolist(), round(float(advantages.abs().max()), 5)))
    return sorted(found)


@pytest.mark.parametrize("updates", [3, 5, 16])
def test_updates_cut_the_rollouts_into_mini_batches(folder, updates):
    """16 answers do not divide by 3 or 5: each is in one mini-batch, whose numbers differ by one at most."""
    settings = {"updates_per_rollout": updates, "num_iterations": 2, "steps": 2 * updates, "beta": 0.1}
    with opened(arguments(folder, f"cut-{updates}", **settings, checkpoint_every=2 * updates)) as (_, source, _):
        handed = [source.batch(step) for step in range(2 * updates)]
        assert all(first is second for first, second in zip(handed[:updates], handed[updates:], strict=True))
        cut = handed[:updates]
        trained = sum(batch is not None for batch in cut)
        with opened(arguments(folder, f"whole-{updates}", beta=0.1)) as (_, undivided, _):
            whole = answers_of([undivided.batch(0)])
        assert answers_of(cut) == whole
        counts = [len(answers_of([batch])) for batch in cut]
        assert max(counts) - min(counts) <= 1 and trained == min(updates, len(whole))
        for batch in filter(None, cut):
            torch.testing.assert_close(batch.extras.old_logprobs, batch.extras.sampler_logprobs, rtol=0, atol=1e-5)
            assert bool((batch.extras.ref_logprobs[batch.labels != IGNORE] < 0).all())


def test_the_first_mini_batch_alone_meets_the_policy_as_it_is(folder):
    with opened(arguments(folder, "first", updates_per_rollout=2)) as (_, source, _):
        first, second = source.batch(0), source.batch(1)
        assert first.extras.old_logprobs is None and second.extras.old_logprobs is not None


def test_the_samplers_log_probabilities_can_be_the_denominator(folder):
    with opened(arguments(folder, "sampler", recompute_logprobs=False)) as (_, source, _):
        batch = source.batch(0)
        assert batch.extras.sampler_logprobs is None
        assert bool((batch.extras.old_logprobs[batch.labels != IGNORE] < 0).all())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample_rounds": 2, "rewards": {"format": 1.0, "length": 0.01}, "checkpoint_every": 1},
        {"updates_per_rollout": 2, "refresh_reference_every": 3, "steps": 8, "beta": 0.1},
        {"updates_per_rollout": 3, "num_iterations": 2, "steps": 18, "checkpoint_every": 6, "beta": 0.1},
    ],
)
def test_a_run_broken_off_anywhere_ends_with_the_weights_of_an_unbroken_one(folder, tmp_path_factory, settings):
    name = tmp_path_factory.mktemp("broken").name
    whole, _ = trained(folder, f"{name}-whole", **settings)
    steps = settings.get("steps", 4)
    for stop in (steps // 2, steps - 1):
        trained(folder, f"{name}-{stop}", stop, **settings)
        assert trained(folder, f"{name}-{stop}", **settings)[0] == whole


def test_the_reference_becomes_the_policy_and_what_no_checkpoint_needs_is_dropped(folder):
    settings = {
        "steps": 8,
        "refresh_reference_every": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 1,
        "keep_best": False,
    }
    trained(folder, "refresh", **settings)
    kept = sorted(path.name for path in (folder / "refresh").glob("reference-*"))
    assert kept == ["reference-00000004", "reference-00000006"]
    with opened(arguments(folder, "refresh", **settings)) as (_, source, trainer):
        assert trainer._resume() == 8
        reference = source.builder.reference
        reference.bring_to(7, trainer.engine)
        found = weights_digest(reference._engine.full_state())
        reference.bring_to(8, trainer.engine)
        assert weights_digest(reference._engine.full_state()) == weights_digest(trainer.engine.full_state()) != found


def test_a_step_without_a_group_to_learn_from_trains_nothing_and_says_so(folder):
    settings = {"rewards": {"format": 1.0}, "steps": 2}  # random weights never write a whole thinking block
    digest, measured = trained(folder, "nothing", **settings)
    with opened(arguments(folder, "untouched")) as (_, _, trainer):
        assert weights_digest(trainer.engine.full_state()) == digest
    for figures in measured:
        assert (figures["untrained_step"], figures["skipped_groups"], figures["zero_variance_groups"]) == (
            1.0,
            4.0,
            1.0,
        )


def test_answers_cut_off_can_be_kept_from_training(folder):
    with opened(arguments(folder, "masked", mask_truncated=True, prompts_per_step=11)) as (_, source, trainer):
        batch = source.batch(0)
        free = batch.extras.trained > 0
        assert 0 < int(free.sum()) < int((batch.labels != IGNORE).sum())
        assert trainer.engine.train_step(batch, trainer.objective, 1e-3).weight == float(free.sum())


def refuses(folder: Path, message: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=message), opened(arguments(folder, "refused", **settings)):
        pass


def test_prompts_that_leave_no_room_are_left_out_and_counted(folder):
    with opened(arguments(folder, "all")) as (_, source, _):
        longest = max(len(question.prompt) for question in source.collector.questions)
        assert source.left_out == 0
    with opened(arguments(folder, "long", max_new_tokens=64 + 1 - (longest - 1))) as (_, source, _):
        assert source.left_out == 1, "10 + 10 alone has two digits more"
        source.batch(0)
        assert source.metrics()["left_out_prompts"] == 1
    refuses(folder, "max_new_tokens=64: none of 11 prompts", max_new_tokens=64)


def test_staleness_needs_workers(folder):
    message = "max_staleness=1: the training ranks cannot sample while they train"
    refuses(folder, message, rollout={"max_staleness": 1})


def test_a_checkpoint_before_the_first_batch_carries_nothing(folder):
    with opened(arguments(folder, "fresh")) as (_, source, _):
        state = source.state()
        assert isinstance(source, RolloutSource) and list(state) == ["rollouts.pt"]
        source.load_state(state)
        assert source._place is None and source._ready is None

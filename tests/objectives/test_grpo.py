"""GRPO's losses equal TRL's, and do not depend on how answers lie in rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from trl import GRPOConfig

from model.layers.loss import IGNORE, label_logprobs
from model.parallel.mesh import Mesh, MeshSizes
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.objectives.grpo import Grpo
from ray_pipeline.objectives.sampler_gap import Correction, SamplerGap
from ray_pipeline.settings.schema import GrpoConfig
from ray_pipeline.training.grpo.setup import objective_of
from tests.engine.test_parity import CONFIG
from tests.objectives import batches, trl_oracles

LOSSES = ("grpo", "dr_grpo", "dapo")
LEVELS = ("token", "sequence")
SETTINGS = {"beta": 0.07, "clip_low": 0.1, "clip_high": 0.2, "temperature": 1.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model() -> Transformer:
    from model.init import init_weights

    built = Transformer(CONFIG)
    init_weights(built, CONFIG, 0)
    return built


@pytest.fixture
def hidden() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(len(batches.ROWS), batches.SEQ, CONFIG.hidden_size, generator=generator).requires_grad_()


def of_trl(model, hidden, batch, loss_type, level, **settings):
    logprobs = label_logprobs(hidden, model.lm_head, batch.labels)
    given = {"beta": 0.07, "epsilon_low": 0.1, "epsilon_high": 0.2} | settings
    return trl_oracles.grpo_loss(logprobs, batch, loss_type=loss_type, importance_sampling_level=level, **given)


def assert_same(got: torch.Tensor, want: torch.Tensor, hidden: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(value, hidden)[0] for value in (got, want)]
    assert float(gradients[1].abs().max()) > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "truncated masked"])
def test_loss_and_gradient_are_trls(model, hidden, loss_type, level, masked):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.4)
    if masked:
        kept = (torch.arange(batches.count(batches.ROWS)) % 3 > 0).float()
        batch.extras.trained = batches.by_document(batch, kept)
    objective = Grpo(loss_type=loss_type, importance_sampling_level=level, **SETTINGS)
    values = objective(model, hidden, None, batch)
    want, logged = of_trl(model, hidden, batch, loss_type, level)
    assert_same(values[0] / objective.weight(batch), want, hidden)
    if level == "token" and not objective.by_answer:  # TRL means over tokens whatever the loss
        figures = dict(zip(objective.metric_names, (values[1:] / objective.weight(batch)).tolist(), strict=True))
        assert figures["kl"] == pytest.approx(logged["kl"], abs=1e-6)
        assert figures["clipped_low"] == pytest.approx(logged["clip_ratio/low_mean"], abs=1e-6)
        assert figures["clipped_high"] == pytest.approx(logged["clip_ratio/high_mean"], abs=1e-6)
        assert min(figures["clipped_low"], figures["clipped_high"]) > 0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_step_is_what_trl_accumulates_over_micro_batches(model, hidden, loss_type):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.4)
    objective = Grpo(loss_type=loss_type, **SETTINGS)
    parts = [batch.rows(0, 4), batch.rows(4, 8)]
    ours = sum(objective(model, hidden[4 * i : 4 * i + 4], None, part)[0] for i, part in enumerate(parts))
    want, _ = of_trl(model, hidden, batch, loss_type, "token", micro_batches=2)
    assert_same(ours / objective.weight(batch), want, hidden)


def of_answers(batch: Batch, values: torch.Tensor) -> list[torch.Tensor]:
    """The values at the labels of each answer."""
    return [
        values[row][(batch.doc_ids[row] == document) & (batch.labels[row] != IGNORE)]
        for row, documents in enumerate(batches.ROWS)
        for document in range(len(documents))
    ]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [("token_truncate", None, 1.2), ("token_truncate", 0.8, 1.2), ("token_mask", 0.8, 1.25), ("token_mask", 0.9, None),
     ("sequence_truncate", 0.7, 1.3), ("sequence_mask", None, 1.2), ("sequence_mask", 0.8, None)],
)  # fmt: skip
def test_corrections_are_trls(model, hidden, loss_type, mode, low, high):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.4)
    kept = (torch.arange(batches.count(batches.ROWS)) % 3 > 0).float()
    batch.extras.trained = batches.by_document(batch, kept)
    gap = SamplerGap()
    objective = Grpo(loss_type=loss_type, correction=Correction(mode, low, high), gap=gap, **SETTINGS)
    given = {"mode": mode, "clip_min": low, "clip_max": high}
    want, _ = of_trl(model, hidden, batch, loss_type, "token", correction=given)
    assert_same(objective(model, hidden, None, batch)[0] / objective.weight(batch), want, hidden)
    uncorrected = Grpo(loss_type=loss_type, **SETTINGS)(model, hidden, None, batch)[0] / objective.weight(batch)
    assert abs(uncorrected.item() - want.item()) > 1e-4

    trained = batch.extras.trained * (batch.labels != IGNORE)
    difference = (batch.extras.old_logprobs - batch.extras.sampler_logprobs) * trained
    answers = zip(of_answers(batch, difference), of_answers(batch, trained), strict=True)
    differences = [answer[free > 0] for answer, free in answers if free.any()]
    ratio = torch.stack([d.sum() for d in differences]).exp() if "sequence" in mode else torch.cat(differences).exp()
    outside = (ratio < (low or 0)) | (ratio > (high or 1e9))
    weights = ratio.masked_fill(outside, 0.0) if "mask" in mode else ratio.clamp(low, high)
    figures = gap.figures(Mesh(MeshSizes()))
    assert 0 < figures["correction_outside"] == pytest.approx(outside.float().mean().item())
    assert figures["correction_mean"] == pytest.approx(weights.mean().item(), rel=1e-5)
    share = weights.sum() ** 2 / (len(weights) * weights.square().sum())
    assert figures["effective_sample_size"] == pytest.approx(share.item(), rel=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sampled", [True, False], ids=["another sampler", "the trainer's own"])
def test_bad_answers_that_are_far_off_policy_are_masked_as_trl_does(model, hidden, level, sampled):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.4)
    if not sampled:
        batch.extras.sampler_logprobs = None
    correction = Correction("token_truncate", None, 3.0) if sampled else None
    given = {"mode": "token_truncate", "clip_min": None, "clip_max": 3.0} if sampled else None
    objective = Grpo(
        loss_type="grpo", importance_sampling_level=level, off_policy_threshold=0.05, correction=correction, **SETTINGS
    )
    want, _ = of_trl(model, hidden, batch, "grpo", level, correction=given, off_policy_mask_threshold=0.05)
    values = objective(model, hidden, None, batch)
    assert_same(values[0] / objective.weight(batch), want, hidden)
    figures = dict(zip(objective.metric_names, (values[1:] / objective.weight(batch)).tolist(), strict=True))
    assert 0 < figures["off_policy_masked"] < 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_kl_estimate_is_trls_also_where_the_ratio_is_1(model, hidden, unbiased, level):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.4)
    objective = Grpo(importance_sampling_level=level, unbiased_kl=unbiased, **SETTINGS | {"beta": 2.0})
    for _ in range(2):
        want, _ = of_trl(model, hidden, batch, "dapo", level, beta=2.0, use_bias_correction_kl=unbiased)
        assert_same(objective(model, hidden, None, batch)[0] / objective.weight(batch), want, hidden)
        batch.extras.old_logprobs = None


def test_our_defaults_are_trls(model, hidden):
    """Loss and gradient of the default settings, and of TRL's with answers from another sampler."""
    theirs = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    ours = GrpoConfig()
    objective = objective_of(ours.model_copy(update={"beta": 0.07}), SamplerGap())
    correction = {name: theirs[f"vllm_importance_sampling_{name}"] for name in ("mode", "clip_min", "clip_max")}
    assert (ours.updates_per_rollout, ours.num_iterations) == (1, theirs["num_iterations"])
    for shift in (0.05, 0.8):
        batch = batches.near(batches.rollouts(), model, hidden, shift)
        want, _ = of_trl(
            model, hidden, batch, theirs["loss_type"], theirs["importance_sampling_level"], correction=correction,
            epsilon_low=theirs["epsilon"], epsilon_high=theirs["epsilon_high"] or theirs["epsilon"],
            use_bias_correction_kl=theirs["use_bias_correction_kl"],
            off_policy_mask_threshold=theirs["off_policy_mask_threshold"],
        )  # fmt: skip
        assert_same(objective(model, hidden, None, batch)[0] / objective.weight(batch), want, hidden)
    assert objective.gap.figures(Mesh(MeshSizes()))["correction_outside"] > 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_answers_in_one_row_count_as_in_rows_of_their_own(model, hidden, loss_type, level):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.4)
    alone = batches.unpacked(batch)
    place = [row for row, documents in enumerate(batches.ROWS) for _ in documents]
    objective = Grpo(
        loss_type=loss_type, importance_sampling_level=level, correction=Correction(f"{level}_mask", 0.8, 1.2),
        off_policy_threshold=0.05, **SETTINGS,
    )  # fmt: skip
    assert objective.weight(batch) == objective.weight(alone)
    packed, apart = objective(model, hidden, None, batch), objective(model, hidden[place], None, alone)
    torch.testing.assert_close(packed, apart, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(values[0], hidden)[0] for values in (packed, apart)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_without_old_logprobs_it_is_trls_first_update(model, hidden, level):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.4)
    batch.extras.old_logprobs = None
    objective = Grpo(loss_type="grpo", importance_sampling_level=level, **SETTINGS)
    want, _ = of_trl(model, hidden, batch, "grpo", level)
    assert_same(objective(model, hidden, None, batch)[0] / objective.weight(batch), want, hidden)


def test_on_policy_it_has_the_policy_gradient(model, hidden):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.0)
    objective = Grpo(beta=0.0, clip_low=0.2, clip_high=0.2, temperature=1.0)
    logprobs = label_logprobs(hidden, model.lm_head, batch.labels)
    plain = -(logprobs * batch.extras.advantages).sum()
    got = [torch.autograd.grad(value, hidden)[0] for value in (objective(model, hidden, None, batch)[0], plain)]
    torch.testing.assert_close(*got)


def test_rows_that_only_pad_change_nothing(model, hidden):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.4)
    padded = batch.pad_rows(11)
    more = torch.cat([hidden, torch.randn(3, *hidden.shape[1:])])
    for loss_type in LOSSES:
        objective = Grpo(loss_type=loss_type, importance_sampling_level="sequence", **SETTINGS)
        assert objective.weight(padded) == objective.weight(batch)
        torch.testing.assert_close(objective(model, more, None, padded), objective(model, hidden, None, batch))


def test_entropy_and_gap_are_means_over_trained_tokens(model, hidden):
    batch = batches.near(batches.rollouts(), model, hidden, shift=0.1)
    labelled = batch.labels != IGNORE
    batch.extras.sampler_logprobs = batch.extras.old_logprobs + 0.25 * labelled
    objective = Grpo(beta=0.0, clip_low=0.2, clip_high=0.2, temperature=1.0)
    values = (objective(model, hidden, None, batch)[1:] / objective.weight(batch)).tolist()
    figures = dict(zip(objective.metric_names, values, strict=True))
    logprobs = label_logprobs(hidden, model.lm_head, batch.labels)[labelled]
    assert figures["entropy"] == pytest.approx(-logprobs.mean().item(), rel=1e-5)
    assert figures["logprob_gap"] == pytest.approx(0.25, rel=1e-5)
    batch.extras.sampler_logprobs = None
    gap = (logprobs - batch.extras.old_logprobs[labelled]).abs().mean()
    assert objective(model, hidden, None, batch).tolist()[-1] / int(labelled.sum()) == pytest.approx(gap.item())


def test_dr_grpo_needs_the_limit_it_divides_by():
    with pytest.raises(ValueError, match="max_new_tokens=None: dr_grpo divides by it"):
        Grpo(beta=0.0, clip_low=0.2, clip_high=0.2, temperature=1.0, loss_type="dr_grpo")

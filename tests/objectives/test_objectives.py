"""Objectives against the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.loss import IGNORE, label_logprobs
from model.transformer import Transformer
from ray_pipeline.data.batch import Batch
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.objectives.distillation import ForwardKl
from ray_pipeline.objectives.grpo import Grpo
from tests.engine.test_parity import CONFIG, make_batch


@pytest.fixture
def model() -> Transformer:
    from model.init import init_weights

    built = Transformer(CONFIG)
    init_weights(built, CONFIG, 0)
    return built


@pytest.fixture
def hidden() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 16, CONFIG.hidden_size, generator=generator)


def rollout_batch(model: Transformer, hidden: torch.Tensor, shift: float) -> Batch:
    """A batch whose old log-probabilities differ from the present ones by up to `shift`."""
    batch = make_batch(1)
    generator = torch.Generator().manual_seed(6)
    logprobs = label_logprobs(hidden, model.lm_head, batch.labels).detach()
    noise = shift * (2 * torch.rand(logprobs.shape, generator=generator) - 1)
    batch.extras["old_logprobs"] = logprobs + noise
    batch.extras["ref_logprobs"] = logprobs - noise
    batch.extras["advantages"] = torch.randn(logprobs.shape, generator=generator)
    return batch


def test_grpo_is_the_clipped_surrogate_plus_k3(model, hidden):
    batch = rollout_batch(model, hidden, shift=0.5)
    objective = Grpo(beta=0.1, clip_low=0.2, clip_high=0.3, temperature=1.0)
    values = objective(model, hidden, None, batch)
    total = clipped = 0.0
    logits = F.linear(hidden, model.lm_head.weight).log_softmax(-1)
    for row in range(8):
        for t in range(16):
            label = int(batch.labels[row, t])
            if label == IGNORE:
                continue
            new = float(logits[row, t, label])
            ratio = torch.tensor(new - float(batch.extras["old_logprobs"][row, t])).exp()
            advantage = float(batch.extras["advantages"][row, t])
            log_ratio = torch.tensor(float(batch.extras["ref_logprobs"][row, t]) - new)
            bounded = ratio.clamp(0.8, 1.3)
            total += float(-torch.minimum(ratio * advantage, bounded * advantage))
            total += 0.1 * float(log_ratio.exp() - log_ratio - 1)
            clipped += float(ratio * advantage > bounded * advantage)
    torch.testing.assert_close(float(values[0].detach()), total, rtol=1e-5, atol=1e-5)
    assert float(values[3]) == clipped > 0


def test_on_policy_grpo_has_the_policy_gradient(model, hidden):
    batch = rollout_batch(model, hidden, shift=0.0)
    hidden.requires_grad_()
    Grpo(beta=0.0, clip_low=0.2, clip_high=0.2, temperature=1.0)(model, hidden, None, batch)[0].backward()
    got, hidden.grad = hidden.grad, None
    logprobs = label_logprobs(hidden, model.lm_head, batch.labels)
    (-(logprobs * batch.extras["advantages"]).sum()).backward()
    torch.testing.assert_close(got, hidden.grad)


def test_forward_kl_is_zero_for_the_teacher_itself_and_torchs_kl_otherwise(model, hidden):
    batch = make_batch(1)
    batch.extras["teacher_hidden"] = hidden
    head = model.lm_head.weight.detach()
    objective = ForwardKl(2.0, model.lm_head)
    assert abs(float(objective(model, hidden, None, batch)[0])) < 1e-4
    other = hidden + 0.3
    got = float(objective(model, other, None, batch)[0].detach())
    kept = batch.labels != IGNORE
    student = torch.distributions.Categorical(logits=F.linear(other[kept], head) / 2)
    teacher = torch.distributions.Categorical(logits=F.linear(hidden[kept], head) / 2)
    expected = 4 * float(torch.distributions.kl_divergence(teacher, student).sum())
    assert got > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_cross_entropy_counts_labelled_tokens_and_adds_mtp(model, hidden):
    batch = make_batch(1)
    objective = CrossEntropy(mtp_weight=0.5)
    embeddings = torch.randn(hidden.shape[0], hidden.shape[1] + 1, hidden.shape[2])
    total, main, ahead, tokens = objective(model, hidden, embeddings, batch).tolist()
    assert objective.weight(batch) == int((batch.labels != IGNORE).sum())
    torch.testing.assert_close(total, main + 0.5 * ahead, rtol=1e-5, atol=0)
    assert 0 < tokens < objective.weight(batch)
    logits = F.linear(hidden, model.lm_head.weight).transpose(1, 2)
    expected = float(F.cross_entropy(logits, batch.labels, reduction="sum", ignore_index=IGNORE).detach())
    torch.testing.assert_close(main, expected, rtol=1e-5, atol=0)

"""Divergences from a teacher equal TRL's, without its logits or the student's ever being whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.init import init_weights
from model.kernels import limits
from model.kernels.weight_gradients import BackwardSplit
from model.layers.chunked_loss import chunked_sums
from model.layers.loss import IGNORE
from model.parallel.collectives import LOCAL
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch, Extras
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.objectives.distillation import Distillation, distillation_objective
from ray_pipeline.objectives.divergence import Divergence, TopKTeacher, WholeTeacher
from ray_pipeline.settings.schema import DistillationConfig
from tests.engine.test_parity import CONFIG
from tests.model.layers.test_chunked_loss import LargestTensor
from tests.objectives import batches
from tests.objectives.trl_oracles import generalized_jsd

ROWS, VOCAB = 72, CONFIG.vocab_size  # enough tokens for three chunks of 256
BETAS = [0.0, 0.2, 0.5, 1.0]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(limits, "CHUNK_BYTES", {"cpu": 1})


@pytest.fixture(scope="module")
def models() -> tuple[Transformer, Transformer]:
    """Student and teacher."""
    built = Transformer(CONFIG), Transformer(CONFIG)
    for seed, model in enumerate(built):
        init_weights(model, CONFIG, seed)
    return built


@pytest.fixture
def hidden() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(ROWS, batches.SEQ, CONFIG.hidden_size, generator=generator).requires_grad_()


@pytest.fixture
def batch() -> Batch:
    made = batches.answers(batches.ROWS * (ROWS // len(batches.ROWS)), seed=3)
    generator = torch.Generator().manual_seed(7)
    made.extras.teacher_hidden = torch.randn(*made.labels.shape, CONFIG.hidden_size, generator=generator)
    return made


def of_trl(models, hidden, batch, beta, temperature):
    student, teacher = models
    return generalized_jsd(
        F.linear(hidden, student.lm_head.weight), F.linear(batch.extras.teacher_hidden, teacher.lm_head.weight.data),
        batch.labels, beta=beta, temperature=temperature,
    )  # fmt: skip


def gradients(loss, model, hidden):
    return torch.autograd.grad(loss, (hidden, model.lm_head.weight))


def top_k(models, batch, k, temperature) -> Extras:
    logits = F.linear(batch.extras.teacher_hidden, models[1].lm_head.weight.data) / temperature
    logprobs, ids = logits.log_softmax(-1).topk(k)
    return Extras(teacher_topk_ids=ids, teacher_topk_logprobs=logprobs)


def with_top_k(models, batch, k, temperature) -> Batch:
    return Batch(batch.tokens, batch.labels, batch.doc_ids, top_k(models, batch, k, temperature))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradients_are_trls_times_the_square_of_the_temperature(models, hidden, batch, beta, temperature):
    student, teacher = models
    objective = Distillation(Divergence(beta, temperature), teacher_head=teacher.lm_head)
    weight = objective.weight(batch)
    assert weight == int((batch.labels != IGNORE).sum()) > 512
    values = objective(student, hidden, None, batch)
    want = of_trl(models, hidden, batch, beta, temperature) * temperature**2
    torch.testing.assert_close(values[0] / weight, want, rtol=1e-6, atol=1e-6)
    got = gradients(values[0] / weight, student, hidden)
    for a, b in zip(got, gradients(want, student, hidden), strict=True):
        assert float(b.abs().max()) > 1e-5
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    logits = F.linear(hidden, student.lm_head.weight).transpose(1, 2)
    plain = F.cross_entropy(logits, batch.labels, ignore_index=IGNORE, reduction="sum").item()
    assert values.tolist()[2] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_the_teacher_itself_has_nothing_to_learn(models, batch, beta):
    own = batch.extras.teacher_hidden.clone().requires_grad_()
    loss = Distillation(Divergence(beta, 2.0), teacher_head=models[1].lm_head)(models[1], own, None, batch)[0]
    (gradient,) = torch.autograd.grad(loss, own)
    assert abs(loss.item()) < 1e-3 and float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_all_tokens_of_a_list_are_the_whole_distribution(models, hidden, batch, beta):
    student = models[0]
    objective = Distillation(Divergence(beta, 2.0), teacher_head=models[1].lm_head)
    whole = objective(student, hidden, None, batch)
    listed = objective(student, hidden, None, with_top_k(models, batch, VOCAB, 2.0))
    torch.testing.assert_close(listed, whole, rtol=1e-5, atol=1e-3)
    for a, b in zip(*(gradients(v[0], student, hidden) for v in (listed, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_a_list_is_the_divergence_with_all_others_as_one_outcome(models, hidden, batch, beta, temperature):
    """TRL's loss on logits of k + 1 outcomes, the last of them the others' log-sum-exp."""
    student = models[0]
    listed = with_top_k(models, batch, 5, temperature)
    ids, teacher = listed.extras.teacher_topk_ids, listed.extras.teacher_topk_logprobs

    def outcomes(logprobs: torch.Tensor) -> torch.Tensor:
        named = torch.zeros_like(logprobs).scatter(-1, ids, 1.0).bool()
        others = logprobs.masked_fill(named, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logprobs.gather(-1, ids), others], -1)

    mine = outcomes((F.linear(hidden, student.lm_head.weight) / temperature).log_softmax(-1))
    rest = torch.log1p(-teacher.exp().sum(-1, keepdim=True))
    want = generalized_jsd(mine, torch.cat([teacher, rest], -1), batch.labels, beta=beta)
    want = want * temperature**2
    objective = Distillation(Divergence(beta, temperature))
    got = objective(student, hidden, None, listed)[0] / objective.weight(batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(gradients(loss, student, hidden) for loss in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_a_longer_list_tells_more_and_never_more_than_the_whole(models, hidden, batch, beta):
    objective = Distillation(Divergence(beta), teacher_head=models[1].lm_head)
    losses = [objective(models[0], hidden, None, with_top_k(models, batch, k, 1.0)).tolist()[0] for k in (1, 4, 16, 63)]
    whole = objective(models[0], hidden, None, batch).tolist()[0]
    assert losses == sorted(losses) and losses[-1] <= whole * (1 + 1e-6)


def test_hidden_states_are_compared_besides(models, hidden, batch):
    student, head = models[0], models[1].lm_head
    plain = Distillation(Divergence(0.0), teacher_head=head)(student, hidden, None, batch)
    both = Distillation(Divergence(0.0), hidden_weight=0.5, teacher_head=head)(student, hidden, None, batch)
    kept = batch.labels != IGNORE
    error = F.mse_loss(hidden[kept], batch.extras.teacher_hidden[kept], reduction="none").mean(-1).sum()
    torch.testing.assert_close(both[0], plain[0] + 0.5 * error)
    torch.testing.assert_close(both[3], error.detach())
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in (both[0], plain[0] + 0.5 * error)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("listed", [False, True])
def test_no_tensor_is_as_large_as_the_logits(listed):
    tokens, vocab, width = 700, 96, 24
    x, weight = torch.randn(tokens, width, requires_grad=True), torch.nn.Parameter(torch.randn(vocab, width))
    labels, teacher = torch.zeros(tokens, dtype=torch.long), torch.randn(tokens, width)
    with LargestTensor() as seen:
        loss: Any = WholeTeacher(Divergence(0.5), lambda rows: teacher[rows] @ weight.detach().t(), labels, LOCAL)
        if listed:
            loss = TopKTeacher(Divergence(0.5), labels.view(-1, 1), torch.full((tokens, 1), -1.0), labels, LOCAL)
        chunked_sums(x, weight, loss)[0].backward()
    assert 256 * vocab <= seen.numel <= 256 * (vocab + 1) < tokens * vocab


def test_a_deferred_weight_gradient_is_the_same(models, hidden, batch):
    student, head = models[0], models[0].lm_head

    def loss() -> torch.Tensor:
        values: Any = Distillation(Divergence(0.5), teacher_head=models[1].lm_head)(student, hidden, None, batch)
        return values[0]

    head.weight.grad, head.backward_split = None, BackwardSplit()
    loss().backward()
    expected, head.weight.grad = head.weight.grad, None
    with head.backward_split.deferred() as queue:
        loss().backward()
    assert head.weight.grad is None
    queue.run()
    assert torch.equal(head.weight.grad, expected)


def test_under_autocast_products_are_in_bf16_and_the_softmax_in_fp32(models, hidden, batch):
    objective = Distillation(Divergence(0.0), teacher_head=models[1].lm_head)
    with torch.autocast("cpu", torch.bfloat16):
        got = objective(models[0], hidden, None, batch)[0]
    student, teacher = (
        (states.bfloat16() @ model.lm_head.weight.bfloat16().t()).float()
        for states, model in ((hidden, models[0]), (batch.extras.teacher_hidden, models[1]))
    )
    want = generalized_jsd(student, teacher, batch.labels, beta=0.0) * objective.weight(batch)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_a_batch_without_labels_is_zero_with_a_gradient(models, hidden, batch):
    empty = Batch(batch.tokens, torch.full_like(batch.labels, IGNORE), batch.doc_ids, batch.extras)
    loss = Distillation(Divergence(0.5), teacher_head=models[1].lm_head)(models[0], hidden, None, empty)[0]
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], torch.zeros_like(hidden))


def test_settings_name_the_loss():
    def of(**settings: Any) -> Any:
        return distillation_objective(DistillationConfig(**settings), None)

    assert isinstance(of(loss="cross_entropy"), CrossEntropy)
    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "hidden": 0.0}
    assert all(of(loss=loss, temperature=2.0).divergence == Divergence(beta, 2.0) for loss, beta in betas.items())
    assert of(loss="jsd", jsd_beta=0.3).divergence == Divergence(0.3)
    assert of(loss="hidden", hidden_weight=0.7).hidden_weight == 0.7
    assert of(loss="forward_kl", hidden_weight=0.7).hidden_weight == 0.0

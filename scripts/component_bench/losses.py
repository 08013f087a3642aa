"""GRPO, DPO and distillation from hidden states to the gradient of the head: ours, equations, TRL's chunked head.

TRL's trainers compute log-probabilities and divergences in `trl.kernels`; what they make of them is the same formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.init import init_weights
from model.layers.loss import IGNORE
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch, Extras
from ray_pipeline.objectives.base import Objective
from ray_pipeline.objectives.distillation import Distillation
from ray_pipeline.objectives.divergence import Divergence
from ray_pipeline.objectives.grpo import Grpo
from ray_pipeline.objectives.preference import Dpo
from scripts.component_bench.attentions import inputs
from scripts.component_bench.form import BATCH, TOKENS, WIDTH, Component, Form

VOCAB, PROMPT = 8192, 16  # of a row's 64 tokens
CLIP, BETA = 0.2, 0.04  # GRPO's
DPO_BETA = 0.1
TRL_CHUNK = 8192  # of the vocabulary, as TRL's trainers take it: all of this one

Logprobs = Callable[[Tensor], Tensor]
"""Hidden states [4, 64, 512] -> log-probabilities of the labels [4, 64], something where there is none."""


def _model() -> Transformer:
    """The head is what counts."""
    config = ModelConfig(
        hidden_size=WIDTH, vocab_size=VOCAB, num_hidden_layers=1, num_nextn_predict_layers=0, intermediate_size=64,
        initializer_range=0.05,
    )  # fmt: skip
    model = Transformer(config)
    init_weights(model, config, seed=0)
    return model


def _labels(prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Random tokens [4, 64] and the next one of each, IGNORE where `prompts` says so and in the last place."""
    tokens = torch.randint(3, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(3))
    labels = torch.cat([tokens[:, 1:], torch.full((BATCH, 1), IGNORE)], 1)
    return tokens, labels.masked_fill(prompts, IGNORE)


def _noise(like: Tensor, seed: int, deviation: float) -> Tensor:
    return deviation * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def _formula_logprobs(weight: Tensor, labels: Tensor) -> Logprobs:
    index = labels.clamp(min=0).unsqueeze(-1)
    return lambda x: torch.log_softmax(F.linear(x, weight), -1).gather(-1, index).squeeze(-1)


def _trl_logprobs(weight: Tensor, labels: Tensor) -> Logprobs:
    """Of the labelled tokens alone, as TRL's head computes them."""
    from trl.kernels import ChunkedLogProbFunction

    kept = labels != IGNORE

    def logprobs(x: Tensor) -> Tensor:
        made = ChunkedLogProbFunction.apply(x[kept], weight, None, labels[kept], 1.0, TRL_CHUNK, None, 1.0, ())[0]
        return torch.zeros(labels.shape).masked_scatter(kept, made)

    return logprobs


def _ours(objective: Objective, model: Transformer, batch: Batch) -> Callable[[Tensor], Tensor]:
    weight = objective.weight(batch)
    return lambda x: objective(model, x, None, batch)[0] / weight


def grpo() -> Component:
    """Four answers with an advantage each, mean over their tokens (arXiv:2402.03300, eqs. 3 and 4)."""
    model, x = _model(), inputs()
    tokens, labels = _labels((torch.arange(TOKENS) < PROMPT - 1).expand(BATCH, -1))
    head, mask = model.lm_head.weight, labels != IGNORE
    with torch.no_grad():
        new = _formula_logprobs(head, labels)(x)
    old, reference = ((new + _noise(new, seed, 0.2)) * mask for seed in (5, 6))
    advantages = torch.tensor([1.2, -0.4, 0.5, -1.3]).unsqueeze(1).expand(-1, TOKENS).contiguous()
    extras = Extras(advantages=advantages, old_logprobs=old, ref_logprobs=reference)
    batch = Batch(tokens, labels, torch.zeros_like(tokens), extras)
    objective = Grpo(beta=BETA, clip_low=CLIP, clip_high=CLIP, temperature=1.0, unbiased_kl=False)

    def formula(logprobs: Logprobs) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            new = logprobs(x)
            ratio = torch.exp(new - old)
            policy = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            kl = torch.exp(reference - new) - (reference - new) - 1
            return -((policy - BETA * kl) * mask).sum() / mask.sum()

        return loss

    forms = {
        "ours": Form(_ours(objective, model, batch), {"head": head}),
        "plain": Form(formula(_formula_logprobs(head, labels)), {"head": head}),
        "TRL": Form(formula(_trl_logprobs(head, labels)), {"head": head}),
    }
    return Component("arXiv:2402.03300", x, forms)


def dpo() -> Component:
    """Four pairs, each a row: a chosen and a rejected answer of 32 tokens (arXiv:2305.18290, eq. 7)."""
    model, x = _model(), inputs()
    place, half = torch.arange(TOKENS), TOKENS // 2
    document = (place >= half).long().expand(BATCH, -1).contiguous()
    prompts = ((place % half < PROMPT // 2 - 1) | (place % half == half - 1)).expand(BATCH, -1)
    tokens, labels = _labels(prompts)
    head, mask = model.lm_head.weight, labels != IGNORE
    with torch.no_grad():
        reference = (_formula_logprobs(head, labels)(x) + _noise(labels, 5, 0.2)) * mask
    pair = torch.arange(BATCH).unsqueeze(1).expand(-1, TOKENS)
    extras = Extras(pair=pair.contiguous(), chosen=1.0 - document, ref_logprobs=reference)
    batch = Batch(tokens, labels, document, extras)
    objective = Dpo(beta=DPO_BETA)

    def formula(logprobs: Logprobs) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            gained = (logprobs(x) - reference) * mask
            margin = gained[:, :half].sum(1) - gained[:, half:].sum(1)
            return -F.logsigmoid(DPO_BETA * margin).mean()

        return loss

    forms = {
        "ours": Form(_ours(objective, model, batch), {"head": head}),
        "plain": Form(formula(_formula_logprobs(head, labels)), {"head": head}),
        "TRL": Form(formula(_trl_logprobs(head, labels)), {"head": head}),
    }
    return Component("arXiv:2305.18290", x, forms)


def distillation() -> Component:
    """KL(teacher || student), mean over tokens (arXiv:1503.02531), the teacher as wide as the student."""
    model, x = _model(), inputs()
    tokens, labels = _labels((torch.arange(TOKENS) < PROMPT - 1).expand(BATCH, -1))
    head, mask = model.lm_head.weight, labels != IGNORE
    states, other = inputs(7).detach(), _model().lm_head
    with torch.no_grad():
        other.weight.add_(_noise(other.weight, 8, 0.02))
    batch = Batch(tokens, labels, torch.zeros_like(tokens), Extras(teacher_hidden=states))
    objective = Distillation(Divergence(0.0), teacher_head=other)
    teacher = other.weight.detach()

    def plain(x: Tensor) -> Tensor:
        student = torch.log_softmax(F.linear(x[mask], head), -1)
        target = torch.log_softmax(F.linear(states[mask], teacher), -1)
        return F.kl_div(student, target, reduction="batchmean", log_target=True)

    forms = {
        "ours": Form(_ours(objective, model, batch), {"head": head}),
        "plain": Form(plain, {"head": head}),
        "TRL": Form(_trl_divergence(head, states, teacher, mask), {"head": head}),
    }
    return Component("arXiv:1503.02531", x, forms)


def _trl_divergence(head: Tensor, states: Tensor, teacher: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Tensor) -> Tensor:
        given = (x[mask], head, None, states[mask], teacher, None, 0.0, 1.0, 1.0, None, 1.0, None)
        return ChunkedDivergenceFunction.apply(*given)[0].mean()

    return loss

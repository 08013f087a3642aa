"""Recorded experts reach their layers in every layout: the same steps as in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.generate.decode import Decoder, generate
from model.layers.loss import label_logprobs
from model.moe.replay import FREE, columns
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import IGNORE, Batch, Extras
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, SGD, Outcome, assert_equal, case, make_batch, train, train_all
from tests.model.generate.models import build

CASES = {
    2: [
        case(pp=2, optimizer="sgd"), case(pp=2, schedule="zbv", optimizer="sgd"),
        case(pp=2, schedule="interleaved_1f1b", optimizer="sgd"), case(dp=2, ep=2, optimizer="sgd"),
        case(sp=2, optimizer="sgd"), case(tp=2, optimizer="sgd"), case(dp=2, zero_stage=3, optimizer="sgd"),
        case(sp=2, activation_checkpointing="full", optimizer="sgd"),
    ],
    4: [
        case(pp=2, sp=2, ep=2, optimizer="sgd", activation_checkpointing="selective"),
        replace(case(pp=2, dp=2, ep=2, schedule="dualpipev", optimizer="sgd"), micro_batch=1),
    ],
}  # fmt: skip


def replayed(step: int, rows: int = 8) -> Batch:
    """Two of three tokens have experts of their own in every layer."""
    batch = make_batch(step, rows)
    generator = torch.Generator().manual_seed(100 + step)
    k, layers = CONFIG.num_experts_per_tok, columns(CONFIG) // CONFIG.num_experts_per_tok
    order = torch.rand(*batch.tokens.shape, layers, CONFIG.n_routed_experts, generator=generator).argsort(-1)
    routing = order[..., :k].flatten(2)
    routing[torch.rand(batch.tokens.shape, generator=generator) < 1 / 3] = FREE
    batch.extras.routing = routing
    return batch


@pytest.fixture(scope="module")
def outcomes() -> dict[int, list[Outcome]]:
    return {world: run_ranks(train_all, world, cases, replayed)[0] for world, cases in CASES.items()}


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return train(case(optimizer="sgd"), batches=replayed)


@pytest.mark.parametrize(("world", "index"), [(w, i) for w, cases in CASES.items() for i in range(len(cases))],
                         ids=[str(c) for cases in CASES.values() for c in cases])  # fmt: skip
def test_a_layout_replays_as_one_process(outcomes, alone, world, index):
    assert_equal(outcomes[world][index], alone, CASES[world][index])


def test_the_trainers_logprobs_are_the_samplers_though_free_routing_has_become_another():
    model = build(CONFIG)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    answers = generate(Decoder(model), prompts, max_new_tokens=9, eos_ids={0}, record_routing=True)
    tokens = torch.zeros(3, 16, dtype=torch.long)
    labels, routing = torch.full((3, 16), IGNORE), torch.full((3, 16, columns(CONFIG)), FREE)
    for row, (prompt, done) in enumerate(zip(prompts, answers, strict=True)):
        text = torch.tensor(prompt + done.tokens)
        tokens[row, : len(text) - 1], routing[row, : len(text) - 1] = text[:-1], done.routing.long()
        labels[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]
    state = {n: w.flip(0) if n.endswith("e_score_correction_bias") else w for n, w in model.state_dict().items()}
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=SGD, micro_batch=2), initial=state)

    def logprobs(extras: Extras) -> torch.Tensor:
        batch = Batch(tokens, labels, torch.zeros_like(tokens), extras)
        read = engine.per_token(batch, lambda part, x, ahead, rows: label_logprobs(x, part.lm_head, rows.labels))
        return read[labels != IGNORE]

    sampled = torch.tensor([value for done in answers for value in done.logprobs])
    torch.testing.assert_close(logprobs(Extras(routing=routing)), sampled, rtol=0, atol=1e-5)
    assert (logprobs(Extras()) - sampled).abs().max() > 1e-3


def test_replaying_is_not_routing_freely(alone):
    free = train(case(optimizer="sgd"))
    assert free.losses != alone.losses
    assert any(not torch.equal(free.loads[name], load) for name, load in alone.loads.items() if "layers" in name)


def test_a_routing_without_ids_is_routing_freely_to_the_last_bit():
    def nothing_given(step: int) -> Batch:
        batch = make_batch(step)
        batch.extras.routing = torch.full((*batch.tokens.shape, columns(CONFIG)), FREE)
        return batch

    given, free = train(case(optimizer="sgd"), batches=nothing_given), train(case(optimizer="sgd"))
    assert given.losses == free.losses
    assert all(torch.equal(weight, free.weights[name]) for name, weight in given.weights.items())


def test_padding_rows_route_freely_and_load_no_expert_of_a_recording():
    padded = replayed(0).pad_rows(12)
    assert (padded.extras.routing[8:] == FREE).all() and torch.equal(padded.rows(0, 8).tokens, replayed(0).tokens)


def test_a_routing_of_another_model_is_refused():
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=SGD))
    batch = make_batch(0)
    batch.extras.routing = torch.full((*batch.tokens.shape, 2), FREE)
    with pytest.raises(ValueError, match="a routing of 2 expert ids per token: this model's has 6"):
        engine.train_step(batch, CrossEntropy(0.3), SGD.lr)

"""Decoding over shards gives what one process gives: tokens exactly, log-probabilities and recorded experts too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.build import part_over
from model.config import ModelConfig
from model.generate.decode import Completion, Decoder, generate
from model.generate.sharded import ShardedDecoder
from model.generate.stopping import ThinkBudget
from model.parallel.mesh import Mesh, MeshSizes
from model.transformer import Transformer
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.settings.schema import OptimizerConfig
from tests.distributed import run_ranks
from tests.model.generate.models import KINDS, PROMPTS, TINY, build_agreeing

DEEP = replace(TINY, num_hidden_layers=4)
# Kinds whose heads two ranks can share; every other width of the tiny ones too.
CUT = {
    "mla": TINY,
    "no query latent": replace(TINY, q_lora_rank=None),
    "cope": KINDS["mla_cope"],
    "gqa": KINDS["gqa"],
    "mqa, cope": KINDS["mqa_cope"],
    "sliding": KINDS["sliding"],
    "sparse": KINDS["dsa"],
    "recursion": KINDS["recursion"],
    "residual scales": replace(TINY, residual_scales=True),
}
LAYOUTS: dict[str, tuple[MeshSizes, dict[str, Any]]] = {
    "dp4": (MeshSizes(dp=4), {}),
    "dp2-tp2": (MeshSizes(dp=2, tp=2), {}),
    "dp4-ep4": (MeshSizes(dp=4, ep=4), {}),
    "dp2-tp2-ep2": (MeshSizes(dp=2, tp=2, ep=2), {}),
    "sp2-dp2-ep2": (MeshSizes(sp=2, dp=2, ep=2), {}),
    "pp2-dp2-ep2": (MeshSizes(pp=2, dp=2, ep=2), {}),
    "pp4": (MeshSizes(pp=4), {}),
    "pp2-tp2-interleaved": (MeshSizes(pp=2, tp=2), {"schedule": "interleaved_1f1b"}),
    "pp2-dp2-zbv": (MeshSizes(pp=2, dp=2), {"schedule": "zbv"}),
    "dp2-tp2-zero2": (MeshSizes(dp=2, tp=2), {"zero_stage": 2}),
    "dp2-pp2-zero3": (MeshSizes(pp=2, dp=2), {"zero_stage": 3}),
}
SAMPLED = {
    "max_new_tokens": [9, 3, 14, 5, 12],
    "eos_ids": {3, 5, 11, 17},
    "seeds": [7, 8, 9, 10, 11],
    "record_routing": True,
    "think": ThinkBudget(3, (9,), (10, 11)),
    "max_batch": 2,
}
GREEDY = SAMPLED | {"temperature": 0.0, "max_batch": 256}


def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    return build_agreeing(config).state_dict()


def answers(
    rank: int, config: ModelConfig, sizes: MeshSizes, options: dict[str, Any], **asked: Any
) -> list[Completion]:
    """Every replica its share of the prompts; this rank's answers."""
    torch.set_num_threads(1)
    mesh = Mesh(sizes)
    if options:
        options = {**options, "optimizer": OptimizerConfig(name="sgd")}
    engine = Engine(config, mesh, EngineOptions(**options), initial=weights(config))
    decoder = ShardedDecoder(
        [part_over(part, mesh) for part in engine.parts], engine.shards, mesh, options.get("schedule", "1f1b")
    )
    replicas = mesh.axis("replica")
    mine = [prompt for i, prompt in enumerate(PROMPTS) if i % replicas.size == replicas.index]
    given = {
        name: value[replicas.index :: replicas.size] if isinstance(value, list) else value
        for name, value in asked.items()
    }
    made = generate(decoder, mine, **given)
    if options.get("zero_stage", 0) < 3:
        ours = {tensor.data_ptr() for tensor in engine.named_parameters().values()}
        assert {p.data_ptr() for p in weights_of(decoder)} == ours, "weights are read where they are"
    decoder.idle()
    assert all(p.is_meta for p in weights_of(decoder)), "and let go of"
    return made


def weights_of(decoder: ShardedDecoder) -> list[torch.nn.Parameter]:
    return [parameter for part in decoder.parts.values() for parameter in part.parameters()]


def all_layouts(rank: int, names: list[str], asked: list[dict[str, Any]]) -> dict[str, list[list[Completion]]]:
    return {name: [answers(rank, DEEP, *LAYOUTS[name], **one) for one in asked] for name in names}


def all_kinds(rank: int) -> dict[str, list[Completion]]:
    return {name: answers(rank, config, MeshSizes(tp=2), {}, **GREEDY) for name, config in CUT.items()}


def alone(config: ModelConfig, **asked: Any) -> list[Completion]:
    model = Transformer(config).eval()
    model.load_state_dict(weights(config))
    return generate(Decoder(model), PROMPTS, **asked)


def assert_same(got: Completion, want: Completion) -> None:
    assert (got.prompt, got.tokens, got.finished, got.forced) == (want.prompt, want.tokens, want.finished, want.forced)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=2e-5)
    assert torch.equal(got.routing, want.routing)


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, list[list[Completion]]]]:
    return run_ranks(all_layouts, 4, list(LAYOUTS), [GREEDY, SAMPLED])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_of_a_replica_writes_what_one_process_writes(outcomes, name):
    for way, asked in enumerate((GREEDY, SAMPLED)):
        want, sizes = alone(DEEP, **asked), LAYOUTS[name][0]
        assert len({len(one.tokens) for one in want}) > 2, "answers end at different steps"
        for rank, outcome in enumerate(outcomes):
            place = sizes.coordinate(rank)
            replica = place["dp"] * sizes.sp + place["sp"]
            share = want[replica :: sizes.dp * sizes.sp]
            assert len(outcome[name][way]) == len(share) > 0
            for got, one in zip(outcome[name][way], share, strict=True):
                assert_same(got, one)


def test_every_kind_of_attention_is_cut_over_heads():
    for outcome in run_ranks(all_kinds, 2):
        for name, config in CUT.items():
            for got, want in zip(outcome[name], alone(config, **GREEDY), strict=True):
                assert_same(got, want)


def drafted(rank: int) -> list[Completion]:
    return answers(rank, TINY, MeshSizes(tp=2), {}, **(GREEDY | {"speculative": True}))


def test_drafts_of_the_mtp_modules_are_verified_over_shards():
    want = alone(TINY, **(GREEDY | {"speculative": True}))
    assert sum(one.accepted for one in want) > 0
    for outcome in run_ranks(drafted, 2):
        for got, one in zip(outcome, want, strict=True):
            assert (got.tokens, got.drafted, got.accepted) == (one.tokens, one.drafted, one.accepted)

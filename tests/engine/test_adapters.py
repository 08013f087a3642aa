"""Low-rank adapters train alike in every layout, leave the base alone, and merge into the model that was trained."""

from __future__ import annotations

import math

import pytest
import torch

from model.build import build_part
from model.layers.linear import Linear
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.adapters import RowDropout, base_name
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.engine.row_noise import seed_rows
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.lora_targets import adapter_params, linear_layers, target_problem
from ray_pipeline.settings.post_training import LoraConfig
from tests.attention_kinds import KINDS
from tests.distributed import run_ranks
from tests.engine.test_parity import (
    CONFIG,
    OPTIMIZER,
    SGD,
    Case,
    Outcome,
    assert_equal,
    case,
    make_batch,
    train,
    train_all,
)

LORA = LoraConfig(r=4, alpha=8)
ALL = LoraConfig(r=2, target_modules=["q_a_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "eh_proj"])
DROPOUT = LoraConfig(r=4, dropout=0.25)
KINDS_OF = {"attention": LORA, "everything": ALL, "dropout": DROPOUT}


def seeded(step: int) -> Batch:
    return seed_rows(make_batch(step), 0, step)


def with_lora(kind: str, **axes) -> tuple[str, Case]:
    return kind, case(**axes, optimizer="sgd", lora=KINDS_OF[kind])


CASES = [
    *(with_lora(kind, **axes) for kind in KINDS_OF for axes in ({"pp": 2}, {"dp": 2}, {"sp": 2})),
    with_lora("everything", pp=2, schedule="zbv"), with_lora("attention", pp=2, schedule="interleaved_1f1b"),
    with_lora("attention", dp=2, ep=2), with_lora("everything", dp=2, zero_stage=1),
    with_lora("everything", dp=2, zero_stage=2), with_lora("everything", dp=2, zero_stage=3),
    with_lora("attention", pp=2, zero_stage=3),
    with_lora("attention", pp=2, activation_checkpointing="full"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return run_ranks(train_all, 2, [chosen for _, chosen in CASES], seeded)[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    return {kind: train(case(optimizer="sgd", lora=lora), batches=seeded) for kind, lora in KINDS_OF.items()}


def name_of(kind: str, chosen: Case) -> str:
    axes = "-".join(f"{axis}{size}" for axis, size in vars(chosen.sizes).items() if size > 1)
    return "-".join([kind, axes, *(f"{key}={value}" for key, value in chosen.options if key != "lora")])


@pytest.mark.parametrize("index", range(len(CASES)), ids=[name_of(*both) for both in CASES])
def test_a_layout_trains_the_adapters_of_one_process(outcomes, alone, index):
    kind, chosen = CASES[index]
    assert_equal(outcomes[index], alone[kind], chosen)


@pytest.mark.parametrize("kind", KINDS_OF)
def test_only_target_layers_move_and_biases_stay(alone, kind):
    before = Engine(CONFIG, Mesh(MeshSizes())).full_state()
    targets = KINDS_OF[kind].target_modules or ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    for name, weight in alone[kind].weights.items():
        moved = name.split(".")[-2] in targets
        assert torch.equal(weight, before[name]) != moved, name


def engine(lora: LoraConfig = ALL, **options) -> Engine:
    return Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER, lora=lora, **options))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_training_starts_at_the_base_and_the_merged_model_is_what_was_trained(precision):
    adapted = engine(precision=precision)
    base = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(precision=precision))
    objective = CrossEntropy(0.3)
    assert adapted.evaluate(make_batch(9), objective).loss == base.evaluate(make_batch(9), objective).loss
    for step in range(4):
        adapted.train_step(seeded(step), objective, 1e-2)
    merged = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(precision=precision), initial=adapted.full_state())
    tolerance = {"fp32": 2e-6, "bf16": 2e-3, "fp8": 1e-2}[precision]
    got, want = merged.evaluate(make_batch(9), objective).loss, adapted.evaluate(make_batch(9), objective).loss
    assert abs(want - base.evaluate(make_batch(9), objective).loss) > 1e-2
    assert math.isclose(got, want, rel_tol=tolerance)


def test_the_first_step_moves_b_along_the_bases_own_gradient():
    """W + s B A with B = 0: dB = s dW A^T, and A has no gradient yet."""
    adapted = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=SGD, lora=LORA))
    plain = build_part(CONFIG, range(4), Mesh(MeshSizes()))
    batch, objective = make_batch(0), CrossEntropy()
    start = {name: p.detach().clone() for name, p in adapted.trained_parameters().items()}
    norm = adapted.train_step(batch, objective, SGD.lr).grad_norm
    rotation, mask = plain.context(batch.doc_ids, 16)
    hidden = plain.norm(plain.run_layers(plain.embed_tokens(batch.tokens), rotation, mask))
    (objective(plain.eval(), hidden, None, batch)[0] / objective.weight(batch)).backward()
    clip = min(1.0, SGD.grad_clip / (norm + 1e-6))
    for layer in ("layers.0.self_attn.q_a_proj", "layers.3.self_attn.o_proj"):
        gradient = plain.get_parameter(f"{layer}.weight").grad
        a, b = (adapted.trained_parameters()[f"{layer}.lora_{which}.weight"] for which in "AB")
        assert torch.equal(a, start[f"{layer}.lora_A.weight"])
        torch.testing.assert_close(b.detach(), -SGD.lr * clip * 2.0 * gradient @ a.detach().t(), rtol=1e-4, atol=1e-6)


def test_the_optimizer_and_checkpoints_hold_adapters_alone():
    adapted = engine()
    numbers = adapter_params(CONFIG, range(CONFIG.num_hidden_layers), ALL.r, ALL.target_modules)
    assert sum(p.numel() for p in adapted.trained_parameters().values()) == numbers
    assert numbers < CONFIG.num_params() / 10
    held = [p for group in adapted.updater.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == numbers
    keys = {key.partition(".")[2] for key in adapted.state() if key.startswith("exp_avg.")}
    assert keys == set(adapted.trained_parameters())
    adapted.train_step(seeded(0), CrossEntropy(0.3), 1e-2)
    assert all(p.grad is None for p in adapted.named_parameters().values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_linear_layers_is_the_built_models(kind):
    model = build_part(KINDS[kind], range(KINDS[kind].num_hidden_layers), Mesh(MeshSizes()))
    built = [
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name != "lm_head" and ".indexer." not in name
    ]
    assert sorted(linear_layers(model.config, model.layer_range)) == sorted(built)


def test_dropout_belongs_to_the_row_and_scales_what_is_left():
    dropout, batch = RowDropout(0.5, "layers.0"), seeded(0)
    x = torch.ones(8, 16, 4096)
    dropout.read(batch)
    out = dropout(x)
    assert out.unique().tolist() == [0.0, 2.0] and abs(float(out.mean()) - 1) < 0.01
    dropout.read(batch.rows(2, 4))
    assert torch.equal(dropout(x[:2]), out[2:4])
    dropout.eval().read(make_batch(0))
    assert torch.equal(dropout(x), x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q_proj", 'q_proj: not in this model (did you mean "'),
        ("o_porj", 'o_porj: no linear layer has this name (did you mean "o_proj"?). This model has down_proj, eh_proj'),
        ("lm_head", "lm_head: no linear layer has this name"),
    ],
)
def test_a_target_the_model_has_not_is_told_with_those_it_has(name, message):
    assert (target_problem(CONFIG, ["o_proj", name]) or "").startswith(message)
    assert target_problem(CONFIG, []) is None and target_problem(CONFIG, list(ALL.target_modules)) is None


def test_names_of_the_base_are_found_behind_adapters():
    assert base_name("layers.0.self_attn.o_proj.base_layer.weight") == "layers.0.self_attn.o_proj.weight"
    assert base_name("layers.0.self_attn.o_proj.lora_A.default.weight") is None

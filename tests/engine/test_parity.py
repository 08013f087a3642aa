"""Every layout takes the same steps as one process: loss, global gradient norm, weights and expert loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.parallel.gather import all_ranks_gather
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.batch import IGNORE, Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from tests.distributed import run_ranks

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
    num_attention_heads=8, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=8, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, grad_clip=0.5)
SGD = OptimizerConfig(name="sgd", lr=1.0, warmup_steps=0, grad_clip=0.5)
RATES = OPTIMIZER.model_copy(update={"embedding_lr_factor": 5.0, "head_lr_factor": 0.5, "vector_lr_factor": 2.0})
SETTINGS = {"adamw": OPTIMIZER, "sgd": SGD, "rates": RATES}
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A layout, on nodes of `node` ranks, and what runs on it."""

    sizes: MeshSizes = field(default_factory=MeshSizes)
    options: tuple[tuple[str, Any], ...] = ()
    optimizer: str = "adamw"
    precision: str = "fp32"
    micro_batch: int = 2
    node: int | None = None

    def __str__(self) -> str:
        axes = "-".join(f"{axis}{size}" for axis, size in asdict(self.sizes).items() if size > 1)
        more = [f"{key}={value}" for key, value in self.options]
        nodes = [f"node{self.node}"] if self.node else []
        return "-".join([axes or "one", *nodes, *more, self.optimizer, self.precision])


def case(pp=1, dp=1, sp=1, tp=1, ep=1, optimizer="adamw", precision="fp32", **options) -> Case:
    return Case(MeshSizes(pp, dp, sp, tp, ep), tuple(options.items()), optimizer, precision)


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    loads: dict[str, torch.Tensor]


def make_batch(step: int, rows: int = 8, seq_len: int = 16) -> Batch:
    """Random tokens in two documents a row, boundaries differing by row."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, CONFIG.vocab_size, (rows, seq_len), generator=generator)
    cut = torch.randint(1, seq_len, (rows, 1), generator=generator)
    doc_ids = (torch.arange(seq_len)[None] >= cut).long()
    labels = torch.cat([tokens[:, 1:], torch.full((rows, 1), IGNORE)], 1)
    labels[:, :-1][doc_ids[:, 1:] != doc_ids[:, :-1]] = IGNORE
    return Batch(tokens, labels, doc_ids)


def train(
    case: Case, timeout: timedelta = timedelta(minutes=10), batches: Callable[[int], Batch] = make_batch
) -> Outcome:
    torch.set_num_threads(1)
    mesh = Mesh(case.sizes, timeout=timeout, node=case.node)
    settings = SETTINGS[case.optimizer]
    engine = Engine(
        CONFIG,
        mesh,
        EngineOptions(optimizer=settings, precision=case.precision, micro_batch=case.micro_batch, **dict(case.options)),
    )
    objective = CrossEntropy(mtp_weight=0.3)
    stats = [engine.train_step(batches(step), objective, settings.lr) for step in range(STEPS)]
    loads = {name: load for part in all_ranks_gather(mesh, engine.expert_loads) for name, load in part.items()}
    return Outcome([s.loss for s in stats], [s.grad_norm for s in stats], engine.full_state(), loads)


def train_all(rank: int, cases: list[Case], batches: Callable[[int], Batch] = make_batch) -> list[Outcome] | None:
    outcomes = [train(case, batches=batches) for case in cases]
    return outcomes if rank == 0 else None


@pytest.fixture(scope="module")
def references():
    """One process: (optimizer, precision) -> outcome."""
    cases = [(o, p) for o in ("adamw", "sgd") for p in ("fp32", "bf16")] + [("rates", "fp32")]
    return {(o, p): train(Case(optimizer=o, precision=p)) for o, p in cases}


def assert_equal(got: Outcome, want: Outcome, case: Case) -> None:
    if case.precision == "bf16":  # partial sums are rounded: what stays equal is the loss
        torch.testing.assert_close(got.losses, want.losses, rtol=2e-3, atol=0)
        return
    torch.testing.assert_close(got.losses, want.losses, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.norms, want.norms, rtol=1e-4, atol=0)
    assert got.weights.keys() == want.weights.keys()
    for name, tensor in got.weights.items():
        if case.optimizer == "sgd":
            torch.testing.assert_close(
                tensor, want.weights[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n} {m}"
            )
        else:  # Adam turns the rounding of a gradient near zero into a step of its own: equal in the norm
            difference = (tensor - want.weights[name]).norm() / want.weights[name].norm().clamp(min=1e-6)
            assert difference < 1e-4, f"{name}: {difference}"
    assert got.loads.keys() == want.loads.keys() and want.loads
    for name, load in got.loads.items():
        assert load.sum() == want.loads[name].sum()
        if case.optimizer == "sgd":
            assert torch.equal(load, want.loads[name]), name


def both(*cases: Case) -> list[Case]:
    return [Case(c.sizes, c.options, optimizer, precision) for c in cases
            for optimizer in ("adamw", "sgd") for precision in ("fp32", "bf16")]  # fmt: skip


QUICK = {
    2: [
        case(tp=2), case(tp=2, optimizer="sgd"), case(sp=2, optimizer="sgd"), case(dp=2, ep=2, optimizer="sgd"),
        case(dp=2, zero_stage=1, optimizer="sgd"), case(dp=2, zero_stage=2), case(dp=2, zero_stage=3),
        case(dp=2, ep=2, zero_stage=1, optimizer="sgd"), case(dp=2, ep=2, zero_stage=3, optimizer="sgd"),
        case(pp=2, zero_stage=3), case(pp=2, schedule="zbv"), case(pp=2, schedule="interleaved_1f1b", zero_stage=2),
        case(dp=2, zero_stage=2, offload_optimizer=True), case(dp=2, zero_stage=3, activation_checkpointing="full"),
        case(sp=2, activation_checkpointing="selective"), case(tp=2, precision="bf16"),
        case(tp=2, optimizer="rates"), case(pp=2, optimizer="rates"), case(dp=2, ep=2, zero_stage=1, optimizer="rates"),
        case(dp=2, zero_stage=2, optimizer="rates"), case(dp=2, zero_stage=3, optimizer="rates"),
    ],
    4: [
        case(pp=2, dp=2, ep=2, zero_stage=2, optimizer="sgd"), case(dp=2, tp=2, ep=2, optimizer="sgd"),
        case(dp=2, tp=2, ep=2, zero_stage=3, optimizer="sgd"), case(pp=2, sp=2, ep=2, zero_stage=1, optimizer="sgd"),
        case(sp=2, tp=2, zero_stage=2), case(pp=4),
        # The first stage has no experts, the second one has.
        case(pp=2, sp=2, ep=2, zero_stage=2, pp_layout="E+1|3+H", optimizer="sgd"),
        case(pp=2, dp=2, ep=2, zero_stage=3, pp_layout="E+1|3+H", optimizer="sgd"),
        # Experts' tokens go between nodes and within them.
        replace(case(dp=4, ep=4, zero_stage=2, optimizer="sgd"), node=2),
        replace(case(dp=2, tp=2, ep=2, activation_checkpointing="full", optimizer="sgd"), node=2),
    ],
}  # fmt: skip

# Pairs of layout and ZeRO stage; each runs with both optimizers in both precisions.
MATRIX = both(
    *(case(pp=2, dp=2, tp=2, ep=2, zero_stage=stage) for stage in range(4)),
    *(case(pp=2, dp=2, sp=2, ep=4, zero_stage=stage) for stage in range(4)),
    case(dp=2, sp=2, tp=2), case(dp=2, sp=2, tp=2, ep=2, zero_stage=2), case(dp=2, sp=2, tp=2, ep=4, zero_stage=3),
    case(dp=8), case(dp=8, ep=8, zero_stage=1), case(dp=8, ep=4, zero_stage=2), case(dp=4, sp=2, ep=8, zero_stage=3),
    case(tp=8), case(sp=8), case(sp=8, ep=4, zero_stage=1), case(pp=4, tp=2), case(pp=4, dp=2, ep=2, zero_stage=2),
    case(pp=2, tp=4, zero_stage=3), case(pp=2, dp=4, ep=2, schedule="zbv", zero_stage=1),
    case(pp=2, dp=2, tp=2, ep=2, schedule="interleaved_1f1b", zero_stage=2),
    case(pp=2, sp=2, dp=2, ep=4, schedule="zbv"), case(pp=2, tp=2, sp=2, schedule="interleaved_1f1b"),
    case(pp=2, dp=2, tp=2, activation_checkpointing="full", zero_stage=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def outcomes():
    """Cases of one world run in the same processes: starting them is what takes time."""
    return {world: run_ranks(train_all, world, cases)[0] for world, cases in QUICK.items()}


@pytest.mark.parametrize(("world", "index"), [(w, i) for w, cases in QUICK.items() for i in range(len(cases))],
                         ids=[str(c) for cases in QUICK.values() for c in cases])  # fmt: skip
def test_layout_equals_one_process(references, outcomes, world, index):
    case = QUICK[world][index]
    assert_equal(outcomes[world][index], references[case.optimizer, case.precision], case)


@pytest.fixture(scope="module")
def matrix():
    """Sixteen at a time: threads of gloo's groups stay until their processes end, and a hundred cases crawl."""
    some = [MATRIX[start : start + 16] for start in range(0, len(MATRIX), 16)]
    return [outcome for cases in some for outcome in run_ranks(train_all, 8, cases)[0]]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(MATRIX)), ids=[str(c) for c in MATRIX])
def test_layout_of_eight_ranks_equals_one_process(references, matrix, index):
    case = MATRIX[index]
    assert_equal(matrix[index], references[case.optimizer, case.precision], case)


def test_gradient_accumulation_1x8_equals_8x1():
    ones, eight = (train(Case(micro_batch=size, optimizer="sgd")) for size in (1, 8))
    assert_equal(ones, eight, Case(optimizer="sgd"))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(references, recompute):
    got = train(Case(options=(("activation_checkpointing", recompute),)))
    want = references["adamw", "fp32"]
    assert got.losses == want.losses and all(torch.equal(got.weights[n], w) for n, w in want.weights.items())
    assert all(torch.equal(got.loads[n], load) for n, load in want.loads.items())


def test_bf16_follows_fp32(references):
    bf16, fp32 = (references["adamw", precision].losses for precision in ("bf16", "fp32"))
    torch.testing.assert_close(bf16, fp32, rtol=2e-2, atol=0)


EVALUATED = [MeshSizes(pp=2, dp=2), MeshSizes(pp=4), MeshSizes(sp=2, tp=2), MeshSizes(dp=2, sp=2, ep=4)]
GATHERED = [(MeshSizes(pp=2, tp=2), 0), (MeshSizes(dp=2, tp=2, ep=2), 3), (MeshSizes(sp=4, ep=4), 2)]


def whole_hidden(engine: Engine) -> torch.Tensor | None:
    return engine.per_token(make_batch(1), lambda model, hidden, ahead, rows: hidden)


def read_in(rank: int) -> dict[str, Any]:
    """What evaluation and sampling read from a model that is spread over ranks."""
    torch.set_num_threads(1)
    sharded = (Engine(CONFIG, Mesh(s), EngineOptions(optimizer=OPTIMIZER, zero_stage=z, seed=7)) for s, z in GATHERED)
    return {
        "losses": [
            Engine(CONFIG, Mesh(s), EngineOptions(micro_batch=2)).evaluate(make_batch(3), CrossEntropy(0.3)).loss
            for s in EVALUATED
        ],
        "states": [engine.full_state() for engine in sharded],
        "hidden": whole_hidden(Engine(CONFIG, Mesh(MeshSizes(dp=2, sp=2)), EngineOptions(micro_batch=2))),
    }


@pytest.fixture(scope="module")
def read():
    return run_ranks(read_in, 4)


def test_evaluation_is_the_same_in_every_layout(read):
    alone = (
        Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(micro_batch=2)).evaluate(make_batch(3), CrossEntropy(0.3)).loss
    )
    for values in zip(*(part["losses"] for part in read), strict=True):
        assert len(set(values)) == 1
        torch.testing.assert_close(values[0], alone, rtol=2e-6, atol=0)


def test_every_rank_gets_the_whole_model_exactly(read):
    want = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(seed=7)).full_state()
    for part in read:
        for state in part["states"]:
            assert state.keys() == want.keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in want.items())


def test_per_token_values_come_back_to_their_places(read):
    want = whole_hidden(Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(micro_batch=8)))
    torch.testing.assert_close(sum(part["hidden"] for part in read), want, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_divide_over_replicas_are_refused():
    engine = Engine(CONFIG, Mesh(MeshSizes()))
    engine.mesh.sizes = MeshSizes(dp=3)
    with pytest.raises(ValueError, match="8 rows cannot be split over dp=3"):
        engine.my_rows(make_batch(0))
    engine.mesh.sizes = MeshSizes(sp=3)
    with pytest.raises(ValueError, match="rows of 16 tokens cannot be split over sp=3"):
        engine.my_rows(make_batch(0))


def test_a_batch_without_labels_is_refused():
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER))
    batch = make_batch(0)
    batch.labels.fill_(IGNORE)
    with pytest.raises(ValueError, match="without a single trained token"):
        engine.train_step(batch, CrossEntropy(), 1e-3)


def test_padding_rows_train_nothing():
    batch = make_batch(0)
    padded = batch.pad_rows(12)
    results = []
    for rows in (batch, padded):
        engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER))
        results.append(engine.train_step(rows, CrossEntropy(0.3), 1e-2))
    assert len(padded) == 12 and results[0].weight == results[1].weight
    torch.testing.assert_close(results[1].loss, results[0].loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(results[1].grad_norm, results[0].grad_norm, rtol=1e-5, atol=0)

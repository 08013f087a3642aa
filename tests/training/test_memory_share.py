"""No rank takes the whole model while it samples with shards: bytes of live tensors against those of the weights."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.records.artifacts import save_model
from ray_pipeline.training.heldout import HeldOut
from tests.costs.live_bytes import peak_bytes
from tests.distributed import run_ranks
from tests.training.grpo_run import MODEL, arguments, opened, prepare

# Routed experts are nine tenths of it, as they are of large models, and activations next to nothing.
LARGE = replace(MODEL, hidden_size=64, moe_intermediate_size=256, num_hidden_layers=4, n_routed_experts=8)
BYTES = 4 * LARGE.num_params()
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "prompts_per_step": 2, "group_size": 2, "optimizer": {"name": "sgd"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2-tp2-ep2": {"dp_size": 2, "tp_size": 2, "ep_size": 2},
    "pp2-tp2": {"pp_size": 2, "tp_size": 2},
    "pp2-dp2-tp2-ep2": {"pp_size": 2, "dp_size": 2, "tp_size": 2, "ep_size": 2},
}
REST = 0.25  # of the model's bytes, for all that is no weight: activations, messages, caches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = prepare(tmp_path_factory.mktemp("run"))
    model = Transformer(LARGE)
    init_weights(model, LARGE, seed=3)
    save_model(made / "large" / "model", LARGE, model.state_dict())
    return made


def grpo(folder: Path, name: str, layout: dict[str, Any]) -> int:
    """The stage up to its saved model: its input, held-out answers, rollouts, an update, held-out answers.

    Returns:
        Bytes of this rank's slice of the weights.
    """
    given = arguments(folder, name, layout=layout, **SETTINGS)
    given["config"]["model"] = asdict(LARGE)
    given["upstream"]["sft"] = str(folder / "large")
    with opened(given) as (rank, source, trainer):
        rank.folder.mkdir(exist_ok=True)
        heldout, engine = HeldOut(rank, source.model), trainer.engine
        heldout.figures()
        batch = source.batch(0)
        assert batch is not None
        engine.train_step(batch, trainer.objective, 1e-3)
        heldout.figures()
        return 4 * sum(parameter.numel() for parameter in engine.named_parameters().values())


def peaks(rank: int, folder: Path, layout: dict[str, Any]) -> dict[str, float]:
    """Most bytes at once, and the slice of the weights, in bytes of the whole model."""
    slices: list[int] = []
    found = {
        way: peak_bytes(lambda way=way: slices.append(grpo(folder, f"{way}{len(layout)}", layout | {"sampling": way})))  # type: ignore[misc]
        for way in ("sharded", "whole")
    }
    return {name: size / BYTES for name, size in (found | {"slice": slices[0]}).items()}


def assert_shares(ranks: list[dict[str, float]], most: float) -> None:
    """Weights, their gradients and the reference are a slice each; a whole copy is laid out for decoding besides."""
    for rank in ranks:
        assert rank["slice"] < most and rank["sharded"] < 3 * rank["slice"] + REST < rank["whole"] - 1, rank


def test_grpo_on_four_ranks_takes_three_slices_with_shards_and_the_model_and_more_with_whole_copies(folder):
    assert_shares(run_ranks(peaks, 4, folder, LAYOUTS["dp2-tp2-ep2"]), most=0.4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("pp2-tp2", 0.3), ("pp2-dp2-tp2-ep2", 0.2)])
def test_so_it_does_over_pipeline_ranks_and_on_eight(folder, name, most):
    layout = LAYOUTS[name]
    assert_shares(run_ranks(peaks, 4 * layout.get("dp_size", 1), folder, layout), most)

"""Every training stage from its input to its saved model: no rank takes more than a few slices of the weights."""

from __future__ import annotations

import importlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.dag.ledger import RunFile
from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields
from tests.cli.made_run import SEQ_LEN, TOY
from tests.costs.live_bytes import peak_bytes
from tests.distributed import run_ranks
from tests.training import dpo_run

# Routed experts are most of it, as they are of large models, and activations next to nothing.
LARGE = replace(TOY, hidden_size=64, moe_intermediate_size=256, num_hidden_layers=4, n_routed_experts=8)
BYTES = 4 * LARGE.num_params()
LAYOUTS: dict[int, dict[str, Any]] = {
    4: {"dp_size": 2, "tp_size": 2, "ep_size": 2},
    8: {"pp_size": 2, "dp_size": 2, "tp_size": 2, "ep_size": 2},
}
# Weights, their gradients, a checkpoint on its way, and in GRPO and DISTILLATION a reference or a teacher.
SLICES = 4
REST = 0.25  # of the model's bytes, for all that is no weight: activations, messages, caches


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dpo_run.preference_run(tmp_path_factory.mktemp("run"), models=("pretrain", "sft", "grpo"), toy=LARGE)


def arguments(run_dir: Path, stage: str, name: str, layout: dict[str, Any]) -> dict[str, Any]:
    """What launchers pass to the stage's `train`: two steps, an evaluation and a checkpoint."""
    common = {"steps": 2, "batch_size": 4, "eval_every": 2, "checkpoint_every": 2, "optimizer": {"name": "sgd"}}
    own: dict[str, dict[str, Any]] = {
        "grpo": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4, "rewards": {"length": 1.0}},
        "distillation": {"teacher_answers": 2, "on_policy": 0.5, "prompts_per_step": 2},
    }
    config = PipelineFields.model_validate(
        {
            "model": asdict(LARGE), "layout": {"micro_batch": 1, **layout}, "tracking": {"wandb": False},
            stage: common | own.get(stage, {}), "run_name": run_dir.name,
            "stages": ["data_prep", "pretrain", "sft", "dpo", "grpo", "distillation"],
            "data": {"seq_len": dpo_run.SEQ_LEN if stage == "dpo" else SEQ_LEN},
            "evaluation": {"questions": 1, "max_new_tokens": 2},
        }
    )  # fmt: skip
    stages = {name: str(run_dir / entry["folder"]) for name, entry in RunFile(run_dir).stages.items()}
    return {
        "config": config.model_dump(mode="json"), "stage": stage, "folder": str(run_dir / name),
        "upstream": stages | {"dpo": stages["sft"]},
    }  # fmt: skip


def peaks(rank: int, run_dir: Path, layout: dict[str, Any]) -> dict[str, float]:
    """Most bytes at once, in bytes of the whole model."""
    found = {}
    for stage in TRAINING_STAGES:
        train = importlib.import_module(f"ray_pipeline.stages.{stage}").train
        for way in ("sharded", "whole") if stage != "pretrain" else ("sharded",):
            given = arguments(run_dir, stage, f"{stage}-{way}-{len(layout)}", layout | {"sampling": way})
            Path(given["folder"]).mkdir(exist_ok=True)
            found[f"{stage}-{way}"] = peak_bytes(partial(train, given)) / BYTES
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_stage_takes_a_few_slices_with_shards_and_the_model_and_more_with_whole_copies(run_dir, ranks):
    layout = LAYOUTS[ranks]
    for found in run_ranks(peaks, ranks, run_dir, layout):
        most = SLICES * largest_slice(layout) + REST
        assert all(peak < most for name, peak in found.items() if name.endswith("sharded")), (most, found)
        assert all(peak > most + 0.5 for name, peak in found.items() if name.endswith("whole")), (most, found)


def largest_slice(layout: dict[str, Any]) -> float:
    """Of the weights, on any rank, over the whole model's."""
    from ray_pipeline.costs.weights import part_weights
    from ray_pipeline.costs.workload import workload
    from ray_pipeline.layout.layout import layout_of

    config = PipelineFields.model_validate({"model": asdict(LARGE), "layout": layout})
    work = workload(config, layout_of(config.layout), "sft")
    each = (part_weights(LARGE, part.layers) for part in work.parts)
    return max(sum(weight.local(layout["tp_size"], layout["ep_size"]) for weight in part) for part in each) * 4 / BYTES

"""A published DeepSeek-V3 folder is fine-tuned without PRETRAIN: its data is prepared with its tokenizer and without
pretraining text, and SFT, GRPO and DISTILLATION start from its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.convert.hf import save_hf
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.stages import data_prep, distillation, sft
from ray_pipeline.training.finish import read_input
from ray_pipeline.training.rank import rank_arguments, start_rank
from tests.cli.made_run import TEXT
from tests.training.distill_run import MODEL


class HereLauncher:
    """Runs the one rank in this process."""

    def run(self, name, function, arguments):
        return function(arguments)


def published_folder(folder: Path) -> Path:
    """Random weights of a DeepSeek-V3 model with a tokenizer of its own."""
    tokenizer = folder.parent / f"{folder.name}-tokenizer"
    save_trained(train_bpe(TEXT * 20, MODEL.vocab_size), tokenizer)
    model = Transformer(MODEL)
    init_weights(model, MODEL, seed=7)
    folder.mkdir()
    save_hf(folder, MODEL, model.state_dict(), tokenizer_folder=tokenizer, model_card="")
    return folder


def settings(folder: Path) -> dict[str, Any]:
    """A run of it at toy size."""
    quick = {"steps": 2, "eval_every": 2, "checkpoint_every": 2, "optimizer.warmup_steps": 0}
    out = {f"{stage}.{key}": value for stage in ("sft", "distillation") for key, value in quick.items()}
    sizes = {"builtin_conversations": 60, "builtin_prompts": 12, "heldout_questions": 4, "seq_len": 128}
    out |= {f"data.{key}": value for key, value in sizes.items()}
    return out | {
        "init_from.path": str(folder), "layout.micro_batch": 2, "tracking.wandb": False,
        "sft.batch_size": 4, "distillation.batch_size": 4,
        "distillation.teacher_answers": 0, "distillation.conversations": True,
        "distillation.student": dict.fromkeys(("moe_intermediate_size", "intermediate_size"))
        | {"num_hidden_layers": 1, "num_nextn_predict_layers": 0},
        "evaluation.questions": 4, "evaluation.max_new_tokens": 4, "grpo.max_new_tokens": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(tmp_path_factory.mktemp("published") / "given")


@pytest.fixture(scope="module")
def config(folder: Path) -> PipelineFields:
    return load_config(None, settings(folder), skip=("pretrain", "grpo"))


@pytest.fixture(scope="module")
def data(config: PipelineFields, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    place = tmp_path_factory.mktemp("data") / "data_prep"
    place.mkdir()
    return data_prep.run(StageContext(config, "run", place.parent, place, {}, HereLauncher()))


def context(config: PipelineFields, stage: str, folder: Path, **inputs: StageResult) -> StageContext:
    place = folder / stage
    place.mkdir(parents=True)
    return StageContext(config, "run", folder, place, inputs, HereLauncher())


def test_no_text_is_prepared_where_nothing_reads_it(data: StageResult, folder: Path) -> None:
    assert not (data.folder / "pretrain").exists()
    assert (data.folder / "sft" / "train").is_dir() and (data.folder / "prompts" / "train.jsonl").is_file()
    own = json.loads((data.folder / "tokenizer" / "tokenizer.json").read_text())
    assert own == json.loads((folder / "tokenizer.json").read_text())
    assert "documents" not in data.metrics and data.metrics["conversations"] > 0


@pytest.mark.parametrize("skipped", [("pretrain",), ("pretrain", "sft"), ("pretrain", "sft", "grpo")])
def test_the_first_stage_starts_from_the_folders_weights(folder, data, tmp_path, skipped) -> None:
    chosen = load_config(None, settings(folder), skip=skipped)
    first = next(stage for stage in ("sft", "grpo", "distillation") if stage not in skipped)
    rank = start_rank(rank_arguments(context(chosen, first, tmp_path, data_prep=data), first))
    model, state = read_input(rank)
    expected = Transformer(model)
    init_weights(expected, MODEL, seed=7)
    assert all(state[name].equal(tensor) for name, tensor in expected.state_dict().items() if name in state)


def test_sft_is_held_against_the_folders_own_model_and_its_result_is_distilled(config, data, tmp_path) -> None:
    trained = sft.run(context(config, "sft", tmp_path, data_prep=data))
    assert set(trained.baselines) >= {"input_accuracy"}
    student = distillation.run(context(config, "distillation", tmp_path, data_prep=data, sft=trained))
    assert student.metrics["params"] < student.metrics["teacher_params"]
    assert student.baselines["teacher_accuracy"] == trained.metrics["accuracy"]


def test_a_folder_that_is_distilled_at_once_is_measured_first(folder, data, tmp_path) -> None:
    chosen = load_config(None, settings(folder), skip=("pretrain", "sft", "grpo"))
    student = distillation.run(context(chosen, "distillation", tmp_path, data_prep=data))
    assert {"input_accuracy", "teacher_accuracy"} == set(student.baselines)

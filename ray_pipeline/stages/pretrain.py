"""PRETRAIN: next-token prediction on packed text, held against ln V and the unigram entropy."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.records.integrity import make_again, read_sealed
from ray_pipeline.settings.run_folder import MANIFEST
from ray_pipeline.training.batch_source import PackedSource
from ray_pipeline.training.finish import save_trained_model
from ray_pipeline.training.initial import initial_state
from ray_pipeline.training.rank import Rank, rank_arguments, start_rank
from ray_pipeline.training.trainer import Trainer
from ray_pipeline.training.validation import validation_loss

STAGE = "pretrain"
HELD_OUT_TOKENS = "pretrain/validation/*.tokens.bin"  # files of DATA_PREP


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: train from random weights, or those of `init_from`; rank 0 leaves the model in `folder/model`."""
    rank: Rank = start_rank(arguments)
    settings = rank.config.pretrain
    initial = initial_state(rank.config)
    engine = rank.trainer_engine(rank.config.model, initial)
    objective = CrossEntropy(settings.mtp_loss_weight)
    rows = PackedRows(rank.data / STAGE / "train")
    source = PackedSource(rows, rank.config.seed, settings.batch_size, rank.mesh.replica)
    validation = PackedRows(rank.data / STAGE / "validation")
    given = {}
    if initial is not None:
        rank.phase("measuring the input")
        given["input_loss"] = validation_loss(engine, validation, objective)["validation_loss"]
    figures = Trainer(rank, engine, objective).fit(source, lambda: validation_loss(engine, validation, objective))
    save_trained_model(rank, engine)
    return figures | given


def baselines(data: Path, vocab_size: int) -> dict[str, float]:
    """Loss in nats of guessing uniformly, and of knowing only how often each token occurs."""
    manifest = read_sealed(data / MANIFEST, make_again(data))
    return {"ln_vocab": math.log(vocab_size), "unigram_entropy": float(manifest["unigram_entropy"])}


def prediction(context: StageContext) -> dict[str, float]:
    """The loss that a law of scaling expects: `predicted_loss` where this text is the one it was fitted on, else
    `predicted_loss_elsewhere`, which is no verdict."""
    expected = context.config.pretrain.prediction
    if expected is None:
        return {}
    data = context.inputs["data_prep"].folder
    files = read_sealed(data / MANIFEST, make_again(data))["files"]
    held = [file["sha256"] for name, file in files.items() if fnmatch(name, HELD_OUT_TOKENS)]
    same = held == [expected.validation]
    return {"predicted_loss" if same else "predicted_loss_elsewhere": expected.loss}


def run(context: StageContext) -> StageResult:
    """Launch the ranks and hold the result against the baselines."""
    figures = context.launcher.run(STAGE, train, rank_arguments(context, STAGE))
    held_against = baselines(context.inputs["data_prep"].folder, context.config.model.vocab_size)
    if "input_loss" in figures:
        held_against["input_loss"] = figures.pop("input_loss")
    learned = figures["validation_loss"] < min(held_against.values())
    held_against |= prediction(context)
    return StageResult(context.folder, figures, held_against, learned)

"""DPO on a run folder made in a second: an untrained model, and pairs of which one answer is always the chosen one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from ray_pipeline.dag.ledger import RunFile
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.forms.preference_records import Preference
from ray_pipeline.data.rows.preferences import write_preferences
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.settings.schema import PipelineFields
from tests.cli.made_run import TOY, make_run

SEQ_LEN = 128
PAIRS = 30
MODEL = replace(TOY, initializer_range=0.2)  # so that an untrained model prefers some tokens to others


def settings_of(*, layout: dict[str, Any] | None = None, **settings: Any) -> PipelineFields:
    """Six steps of four pairs, unless the settings of DPO say otherwise."""
    chosen = {
        "steps": 6, "batch_size": 4, "eval_every": 10, "checkpoint_every": 2, "log_every": 1, "beta": 0.5,
        "optimizer": {"warmup_steps": 0, "lr": 3e-3},
    } | settings  # fmt: skip
    return PipelineFields.model_validate(
        {
            "model": asdict(MODEL), "layout": {"micro_batch": 2, **(layout or {})}, "dpo": chosen, "run_name": "toy",
            "stages": ["data_prep", "pretrain", "sft", "dpo", "export"], "tracking": {"wandb": False},
            "data": {"seq_len": SEQ_LEN, "heldout_questions": 6}, "evaluation": {"questions": 1, "max_new_tokens": 4},
        }
    )  # fmt: skip


def preference_run(
    folder: Path,
    chosen: str = "the cat sat",
    rejected: str = "an owl and the moon",
    *,
    models: tuple[str, ...] = ("sft",),
    toy: ModelConfig = MODEL,
) -> Path:
    """A run folder whose SFT is finished, with pairs of these two answers to different questions."""
    run_dir = make_run(folder, models=models, toy=toy)
    data = folder_of(run_dir, "data_prep")

    def said(text: str) -> tuple[dict[str, Any]]:
        return ({"role": "assistant", "content": text},)

    pairs = [
        Preference(({"role": "user", "content": f"what was on mat {i}"},), said(chosen), said(rejected))
        for i in range(PAIRS)
    ]
    tokenizer = load_tokenizer(data / "tokenizer")
    write_preferences(settings_of(), pairs, tokenizer, data / "preferences", lambda *_: None)
    return run_dir


def folder_of(run_dir: Path, stage: str) -> Path:
    return run_dir / RunFile(run_dir).stages[stage]["folder"]


def context(run_dir: Path, launcher: Any, name: str = "dpo", **settings: Any) -> StageContext:
    """What the workflow gives to `dpo.run`."""
    inputs = {stage: StageResult(folder_of(run_dir, stage)) for stage in ("data_prep", "sft")}
    (run_dir / name).mkdir(exist_ok=True)
    return StageContext(settings_of(**settings), "toy", run_dir, run_dir / name, inputs, launcher)

"""A run folder as the workflow leaves it, made in a second: a tokenizer, packed rows and untrained models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.dag.ledger import RunFile
from ray_pipeline.dag.plan import PlannedStage
from ray_pipeline.dag.stage_task import StageJob, run_stage
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.rows.manifest import write_data_manifest
from ray_pipeline.data.rows.packing import pack_conversations, pack_documents
from ray_pipeline.data.rows.shards import write_rows
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.layout.layout import Layout
from ray_pipeline.records.artifacts import save_model, write_text
from ray_pipeline.settings.chain import upstream
from ray_pipeline.settings.layers import with_checksum
from ray_pipeline.settings.loading import config_yaml, load_config
from ray_pipeline.settings.run_folder import stage_folder

SEQ_LEN = 64
TEXT = ["the cat sat on the mat and looked at the moon", "two and two make four, said the owl, naïve as ever"]
CHAT = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "<think>2+2=4</think>4"}]
QUESTION = {"prompt": "What is 2+2?", "answer": "4", "category": "sum", "difficulty": 1}
TOY = ModelConfig(
    vocab_size=400,
    hidden_size=16,
    intermediate_size=32,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    max_position_embeddings=128,
)


class Body:
    """A stage's function: what the stage leaves in its folder, made by `fill`."""

    def __init__(self, fill: Callable[[Path], None], metrics: dict[str, float]):
        self.fill, self.metrics = fill, metrics

    def __call__(self, context: StageContext) -> StageResult:
        self.fill(context.folder)
        return StageResult(context.folder, self.metrics, {"ln_vocab": 6.0}, None)


def finish(
    run_dir: Path, stage: str, metrics: dict[str, float] | None = None, *, fill: Callable[[Path], None] | None = None
) -> Path:
    """Run a stage as the workflow does, with `fill` in the place of its work; returns its folder."""
    run, config = RunFile(run_dir), load_config(run_dir / "config.yaml")
    identity = (stage.encode().hex() * 8)[:64]
    folder = stage_folder(run_dir, stage, identity)
    read = [name for name in upstream(config, stage) if name in run.stages]
    inputs = [StageResult(run_dir / run.stages[name]["folder"]) for name in read]
    row = PlannedStage(stage, "run", "", 1, 0, identity, folder)
    body = Body(fill or (lambda _: None), metrics or {})
    with mock.patch.dict(os.environ):  # a stage's task sets up a process of its own
        run_stage(StageJob(row, config, Layout(), run_dir, tuple(read), "", body), *inputs)
    run.stages[stage] = {"identity": identity, "folder": folder.name, "decides": {}}
    run.save()
    return folder


def fill_data(folder: Path, questions: Sequence[Mapping[str, Any]]) -> None:
    """What DATA_PREP leaves: a tokenizer, packed rows, questions and the manifest of them all."""
    tokenizer = save_trained(train_bpe(TEXT * 20, 400), folder / "tokenizer")
    options = {"seq_len": SEQ_LEN, "vocab_size": 400, "tokens_per_shard": 1 << 20}
    for split in ("train", "validation"):
        documents = [tokenizer.encode_document(text) for text in TEXT * 40]
        write_rows(folder / "pretrain" / split, pack_documents(documents, SEQ_LEN, tokenizer.pad_id), **options)
        chats = [tokenizer.encode_chat(CHAT)] * 100
        write_rows(folder / "sft" / split, pack_conversations(chats, SEQ_LEN, tokenizer.pad_id)[0], **options)
    lines = [json.dumps(question) + "\n" for question in questions]
    write_text(folder / "prompts" / "train.jsonl", json.dumps(QUESTION) + "\n" + json.dumps(QUESTION) + "\n" + lines[0])
    write_text(folder / "prompts" / "heldout.jsonl", "".join(lines))
    write_data_manifest(folder, {}, unigram_entropy=5.5)


def fill_model(folder: Path, toy: ModelConfig) -> None:
    """What a training stage leaves: an untrained model."""
    model = Transformer(toy)
    init_weights(model, toy, seed=0)
    save_model(folder / "model", toy, model.state_dict())


def make_run(
    output_dir: Path,
    name: str = "toy",
    *,
    models: tuple[str, ...] = ("pretrain", "sft"),
    toy: ModelConfig = TOY,
    questions: Sequence[Mapping[str, Any]] = (QUESTION,),
) -> Path:
    """DATA_PREP and the given training stages, finished, with `questions` held out."""
    run_dir = output_dir / name
    overrides = {"run_name": name, "output_dir": str(output_dir), "data.seq_len": SEQ_LEN, "tracking.wandb": False}
    write_text(run_dir / "config.yaml", with_checksum(config_yaml(load_config(None, overrides))))
    finish(run_dir, "data_prep", fill=lambda folder: fill_data(folder, questions))
    for stage in models:
        finish(run_dir, stage, {"validation_loss": 1.25}, fill=lambda folder: fill_model(folder, toy))
    return run_dir

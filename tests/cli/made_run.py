"""A run folder as the workflow leaves it, made in a second: a tokenizer, packed rows and untrained models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.artifacts import save_model, write_text
from ray_pipeline.config_load import config_yaml, load_config
from ray_pipeline.data.packing import pack_conversations, pack_documents
from ray_pipeline.data.shards import write_rows
from ray_pipeline.data.tokenizer_files import save_trained, train_bpe
from ray_pipeline.ledger import Record, RunFile, stage_folder, write_record

SEQ_LEN = 64
TEXT = ["the cat sat on the mat and looked at the moon", "two and two make four, said the owl, naïve as ever"]
CHAT = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "<think>2+2=4</think>4"}]
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


def finish(run_dir: Path, run: RunFile, stage: str, metrics: dict[str, float] | None = None) -> Path:
    """Enter a stage as done; returns its folder."""
    identity = (stage.encode().hex() * 8)[:64]
    folder = stage_folder(run_dir, stage, identity)
    folder.mkdir(parents=True)
    record = Record(stage, identity, "done", seconds=75.0, metrics=metrics or {}, baselines={"ln_vocab": 6.0})
    write_record(folder, replace(record, weights_digest=None if stage == "data_prep" else "ab" * 32))
    run.stages[stage] = {"identity": identity, "folder": folder.name, "decides": {}}
    run.save()
    return folder


def make_run(
    output_dir: Path, name: str = "toy", *, models: tuple[str, ...] = ("pretrain", "sft"), toy: ModelConfig = TOY
) -> Path:
    """DATA_PREP and the given training stages, finished."""
    run_dir = output_dir / name
    overrides = {"run_name": name, "output_dir": str(output_dir), "data.seq_len": SEQ_LEN}
    write_text(run_dir / "config.yaml", config_yaml(load_config(None, overrides)))
    run = RunFile(run_dir)
    data = finish(run_dir, run, "data_prep")
    tokenizer = save_trained(train_bpe(TEXT * 20, 400), data / "tokenizer")
    options = {"seq_len": SEQ_LEN, "vocab_size": 400, "tokens_per_shard": 1 << 20}
    for split in ("train", "validation"):
        documents = [tokenizer.encode_document(text) for text in TEXT * 40]
        write_rows(data / "pretrain" / split, pack_documents(documents, SEQ_LEN, tokenizer.pad_id), **options)
        chats = [tokenizer.encode_chat(CHAT)] * 100
        write_rows(data / "sft" / split, pack_conversations(chats, SEQ_LEN, tokenizer.pad_id)[0], **options)
    prompt = '{"prompt": "What is 2+2?", "answer": "4", "category": "sum", "difficulty": 1}\n'
    write_text(data / "prompts" / "train.jsonl", prompt * 3)
    write_text(data / "prompts" / "heldout.jsonl", prompt)
    torch.manual_seed(0)
    for stage in models:
        model = Transformer(toy)
        init_weights(model, toy, seed=0)
        save_model(finish(run_dir, run, stage, {"validation_loss": 1.25}) / "model", toy, model.state_dict())
    return run_dir

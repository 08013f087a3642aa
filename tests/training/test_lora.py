"""Adapters as a stage leaves them: peft, given the base, has the merged model; an interrupted run ends alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.config import ModelConfig
from model.convert.hf import save_hf
from model.parallel.mesh import Mesh, MeshSizes
from model.transformer import Transformer
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.launch.launchers import InlineLauncher
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.records.artifacts import weights_digest
from ray_pipeline.records.integrity import damage
from ray_pipeline.settings.post_training import LoraConfig
from ray_pipeline.training.batch_source import SeededSource
from ray_pipeline.training.lora import save_adapter, write_adapter
from ray_pipeline.training.rank import start_rank
from ray_pipeline.training.trainer import Trainer
from tests.engine.test_parity import CONFIG, OPTIMIZER, make_batch
from tests.training.toy_run import Batches, arguments

LORA = LoraConfig(r=4, alpha=8, dropout=0.1, target_modules=["q_a_proj", "kv_b_proj", "o_proj", "down_proj"])
PLAIN = LoraConfig(r=4, alpha=8, target_modules=["q_a_proj", "kv_b_proj", "o_proj", "eh_proj"])
TOKENS = torch.randint(0, CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(4))


def job(folder: Path, **more: Any) -> dict[str, Any]:
    out = arguments(folder, **more)
    out["config"]["sft"] |= {"lora": LORA.model_dump(), "neftune_alpha": 5.0}
    return out


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """Adapters, dropout and noise on one rank, as SFT has them."""
    rank = start_rank(arguments)
    torch.set_num_threads(1)
    sft = rank.config.sft
    engine = rank.trainer_engine(rank.config.model, None, lora=sft.lora)
    source = SeededSource(
        Batches(rank, engine, arguments["fault"], 0.0),
        0,
        neftune_alpha=sft.neftune_alpha,
        hidden_size=CONFIG.hidden_size,
    )
    objective = CrossEntropy(0.3)
    loss = engine.evaluate(make_batch(1000), objective).loss
    Trainer(rank, engine, objective).fit(source, lambda: {"validation_loss": loss})
    save_adapter(rank, engine, sft.lora)
    return {"digest": weights_digest(engine.full_state())}


def test_an_interrupted_run_ends_with_the_same_weights_and_adapter(tmp_path):
    whole = InlineLauncher().run("pretrain", train, job(tmp_path / "whole"))
    with pytest.raises(ZeroDivisionError):
        InlineLauncher().run("pretrain", train, job(tmp_path / "cut", fault={"kind": "bug", "rank": 0, "step": 5}))
    assert InlineLauncher().run("pretrain", train, job(tmp_path / "cut")) == whole
    folders = [tmp_path / run / "toy" / "pretrain-0" / "adapter" for run in ("whole", "cut")]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    assert all(damage(folder) is None for folder in folders)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Engine, Path]:
    """An engine after a few steps, and the folder of its adapter."""
    engine = trained_engine(CONFIG, PLAIN)
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    write_adapter(folder, engine.config, PLAIN, engine.adapter_state())
    return engine, folder


def trained_engine(config: ModelConfig, lora: LoraConfig) -> Engine:
    engine = Engine(config, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER, lora=lora))
    for step in range(4):
        engine.train_step(make_batch(step), CrossEntropy(0.3), 1e-2)
    return engine


def own_model(config: ModelConfig, state: dict[str, torch.Tensor]) -> Transformer:
    model = Transformer(config).eval()
    model.load_state_dict(state)
    return model


def test_peft_puts_the_adapter_on_the_exported_base_and_has_the_merged_models_logits(trained, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    engine, adapter = trained
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": []}))
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tmp_path / "hf").mkdir()
    base = Engine(CONFIG, Mesh(MeshSizes())).full_state()
    save_hf(tmp_path / "hf", CONFIG, base, tokenizer_folder=tokenizer, model_card="")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        plain = theirs(TOKENS).logits
        adapted = PeftModel.from_pretrained(theirs, adapter).eval()(TOKENS).logits
        merged = own_model(CONFIG, engine.full_state())(TOKENS)
    assert (plain - merged).abs().max() > 1e-2
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_peft_puts_the_adapter_on_our_own_base(attention, tmp_path):
    """Architectures that nobody else publishes keep our names."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    config = dataclasses.replace(CONFIG, norm="dyt", first_k_dense_replace=2)
    if attention == "gqa":
        config = dataclasses.replace(config, attention="gqa", num_key_value_heads=4, head_dim=8)
    lora = PLAIN.model_copy(update={"target_modules": ["o_proj", "up_proj"]})
    engine = trained_engine(config, lora)
    write_adapter(tmp_path / "adapter", config, lora, engine.adapter_state())
    base = own_model(config, Engine(config, Mesh(MeshSizes())).full_state())
    inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path / "adapter"), base)
    result = set_peft_model_state_dict(base, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    with torch.no_grad():
        merged = own_model(config, engine.full_state())(TOKENS)
        torch.testing.assert_close(base.eval()(TOKENS), merged, rtol=0, atol=1e-5)


def test_the_files_are_the_same_bytes_every_time(trained, tmp_path):
    engine, adapter = trained
    write_adapter(tmp_path / "again", engine.config, PLAIN, engine.adapter_state())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (adapter / file).read_bytes()
    values = json.loads((adapter / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA" and values["target_modules"] == sorted(values["target_modules"])
    assert {name.rpartition(".")[2] for name in values["target_modules"]} == set(PLAIN.target_modules)

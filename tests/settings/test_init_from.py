"""`--init-from`: the folder decides the model; what contradicts it, or does not fit it, is refused before anything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.convert.hf import save_hf
from model.convert.native import save_native
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.cli import main
from ray_pipeline.cli.options import take_request
from ray_pipeline.dag import workflow
from ray_pipeline.dag.identity import identities, source_digests
from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import write_manifest
from ray_pipeline.settings.loading import config_yaml, load_config
from ray_pipeline.training.initial import initial_state, open_initial

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=512, rms_norm_eps=1e-5,
)  # fmt: skip
FIXED = {"distillation.student": {"num_hidden_layers": 1, "num_nextn_predict_layers": 0}, "data.seq_len": 128}


def write(folder: Path, config: ModelConfig = CONFIG, *, native: bool = False) -> Path:
    """A model folder with random weights and a tokenizer."""
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": []}))
    (tokenizer / "tokenizer_config.json").write_text("{}")
    folder.mkdir()
    model = Transformer(config)
    init_weights(model, config, seed=5)
    save = save_native if native else save_hf
    save(folder, config, model.state_dict(), tokenizer_folder=tokenizer, model_card="")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "given")


def load(folder: Path, changes: dict | None = None, recipe: Path | None = None, env: dict | None = None):
    return load_config(recipe, {**FIXED, "init_from.path": str(folder), **(changes or {})}, env)


def test_the_folder_decides_the_model_and_the_tokenizer(folder):
    config = load(folder)
    assert config.model == CONFIG
    assert config.tokenizer.name == str(folder)
    assert config.pretrain.steps == load_config().pretrain.steps, "the rest is the recipe's"


def test_our_own_format_decides_all_keys(tmp_path):
    own = dataclasses.replace(CONFIG, attention="gqa", num_key_value_heads=1, router_bias_update_rate=0.5)
    assert load(write(tmp_path / "native", own, native=True), {"export.gguf": []}).model == own


def test_training_without_a_folder_is_what_it_was(folder):
    plain = load_config()
    assert not any(key.startswith("init_from") for key in identities(plain)["pretrain"].decides)
    assert open_initial(plain) is None and initial_state(plain) is None


def test_keys_that_agree_or_do_not_change_the_weights_may_be_given(folder):
    config = load(folder, {"model.hidden_size": "32", "model.rms_norm_eps": "1e-5", "model.aux_loss_alpha": 0.01})
    assert (config.model.hidden_size, config.model.aux_loss_alpha) == (32, 0.01)
    assert load(folder, {"model.rope_scaling": "null", "tokenizer.name": str(folder)}).model == CONFIG


@pytest.mark.parametrize(
    ("changes", "clash"),
    [
        ({"model.hidden_size": 64}, r"model\.hidden_size=64 is 32 there \[command line\]"),
        ({"model.hidden_size": "x"}, r"model\.hidden_size=x is 32 there"),
        ({"model.attention": "gqa"}, r"model\.attention=gqa is mla there"),
        ({"model.rope_scaling": {"factor": 2.0}}, r"model\.rope_scaling=\{'factor': 2\.0\} is None there"),
        ({"model_size": "small"}, r"model_size=small asks for another \[command line\]"),
        ({"tokenizer.name": "train"}, r"tokenizer\.name=train is not the folder's own tokenizer"),
    ],
)
def test_a_key_that_contradicts_the_folder_is_refused_with_its_origin(changes, clash, folder):
    with pytest.raises(UserError, match=rf"--init-from {folder}: its model is given.*\n  - {clash}.*\nLeave these"):
        load(folder, changes)


def test_a_recipe_that_names_the_folder_must_agree_with_it(folder, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"init_from: {{path: {folder}}}\nmodel: {{hidden_size: 64}}\n")
    with pytest.raises(UserError, match=r"model\.hidden_size=64 is 32 there \[.*mine\.yaml\]"):
        load_config(recipe, FIXED)
    with pytest.raises(UserError, match=r"model\.v_head_dim=3 is 12 there \[environment\]"):
        load(folder, env={"RAY_PIPELINE_MODEL__V_HEAD_DIM": "3"})
    assert load(folder, env={"RAY_PIPELINE_MODEL__AUX_LOSS_ALPHA": "0.5"}).model.aux_loss_alpha == 0.5


def test_a_stored_run_outlives_the_folder(folder, tmp_path):
    config = load(folder)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config_yaml(config))
    (run / "run.json").write_text("{}")
    assert load_config(run / "config.yaml").model == CONFIG
    known = source_digests(config)
    before = identities(config)
    folder.rename(tmp_path / "elsewhere")
    assert load_config(run / "config.yaml") == config
    assert identities(config, source_digests(config, known)) == before
    with pytest.raises(UserError, match=f"--init-from {folder}: no such folder"):
        open_initial(config)
    with pytest.raises(UserError, match=f"--init-from {folder}: no such folder"):
        load(folder)


def test_contents_of_the_folder_decide_the_identity_and_its_place_does_not(folder, tmp_path):
    one = load(folder)
    keys = {stage: identity.key for stage, identity in identities(one).items()}
    folder.rename(tmp_path / "moved")
    moved = load(tmp_path / "moved")
    assert {stage: identity.key for stage, identity in identities(moved).items()} == keys
    assert identities(load(tmp_path / "moved", {"init_from.exclude": ["lm_head"]}))["pretrain"].key != keys["pretrain"]
    assert identities(load(tmp_path / "moved", {"init_from.max_vocab_size": 400}))["pretrain"].key == keys["pretrain"]
    path = tmp_path / "moved" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert identities(moved)["pretrain"].key != keys["pretrain"]


def test_flags_name_the_folder_and_its_tensors():
    options = {"init_from": "x", "include": ("a", "b"), "exclude": ("c",), "allow_missing": (), "settings": ()}
    overrides = take_request(options).overrides
    assert overrides == {"init_from.path": "x", "init_from.include": ["a", "b"], "init_from.exclude": ["c"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from.include": ["a"]}, r"init_from\.include=\['a'\]: chooses tensors.*give one with --init-from"),
        ({"init_from.exclude": [" "]}, r"init_from\.exclude=\[' '\]: an empty pattern would match every tensor"),
    ],
)
def test_patterns_that_say_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        load_config(None, changes)


def test_a_folder_without_tokenizer_needs_one(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"there is no tokenizer\.json.*--set tokenizer\.name=FOLDER"):
        load(folder)
    assert load(folder, {"tokenizer.name": "org/name"}).tokenizer.name == "org/name"


def test_a_damaged_folder_is_refused_when_the_settings_are_read(folder):
    with pytest.raises(UserError, match=r"--init-from .*vocab_size=320: more than max_vocab_size=100"):
        load(folder, {"init_from.max_vocab_size": 100})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"--init-from .*model\.safetensors: cut short"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"--init-from .*config\.json: not valid JSON"):
        load(folder)


def test_a_file_that_is_not_the_one_exported_is_refused(folder):
    config = load(folder)
    write_manifest(folder)
    assert open_initial(config) is not None
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--init-from .*model\.safetensors: damaged: its SHA-256.*Export it again"):
        open_initial(config)


def test_the_weights_are_the_folders_and_what_is_left_out_is_the_seeds(folder):
    state = initial_state(load(folder, {"init_from.exclude": ["lm_head"], "seed": 9}))
    given, fresh = Transformer(CONFIG), Transformer(CONFIG)
    init_weights(given, CONFIG, seed=5)
    init_weights(fresh, CONFIG, seed=9)
    assert state is not None
    for name, tensor in given.state_dict().items():
        other = fresh.state_dict()[name] if name == "lm_head.weight" else tensor
        assert torch.equal(state[name], other), name


def test_run_says_what_starts_fresh_and_refuses_before_it_starts(folder, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(workflow, "execute", lambda request: started.append(request.config) or 0)
    monkeypatch.setattr("ray_pipeline.data.sources.source_checks.check_sources", lambda config: [])
    small = ["--set", "distillation.student.num_hidden_layers=1", "--seq-len", "128", "--backend", "cpu"]
    command = ["run", "--init-from", str(folder), "--output-dir", str(tmp_path / "runs"), *small]
    assert main([*command, "--exclude", "lm_head"]) == 0
    assert "1 parameters start from fresh weights: lm_head.weight" in capsys.readouterr().out
    assert started[0].model == CONFIG
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert main(command) == 2
    assert "cut short" in capsys.readouterr().err and len(started) == 1


def test_tensors_that_are_not_the_models_are_refused(folder):
    config = load(folder)
    other = dataclasses.replace(CONFIG, intermediate_size=96)
    elsewhere = write(folder.parent / "other", other)
    (elsewhere / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj.weight has shape \[96, 32\], config\.json asks for \[48, 32\]"):
        open_initial(config)


def test_a_number_that_is_not_finite_is_refused(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--init-from .*model\.norm\.weight holds a number that is not finite"):
        initial_state(load(folder))

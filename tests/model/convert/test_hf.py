"""The exported folder is transformers' DeepseekV3, tensor for tensor and logit for logit, and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig, RopeScaling
from model.convert.hf import save_hf
from model.convert.hf_config import special_token_ids, to_hf
from model.convert.hf_load import load_hf
from model.convert.names import published_slots, to_published
from model.init import init_weights
from model.transformer import Transformer

BASE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    n_routed_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.25,
    rope_theta=5000.0,
)
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.0)
VARIANTS = {
    "base": BASE,
    "yarn_groups_scaling": dataclasses.replace(
        BASE, rope_scaling=YARN, n_group=4, topk_group=2, routed_scaling_factor=2.5
    ),
    "q_lora_none_no_norm_two_shared": dataclasses.replace(
        BASE, q_lora_rank=None, norm_topk_prob=False, n_shared_experts=2
    ),
    "all_dense_no_mtp": dataclasses.replace(BASE, first_k_dense_replace=3, num_nextn_predict_layers=0),
    "all_moe_two_mtp": dataclasses.replace(BASE, first_k_dense_replace=0, num_nextn_predict_layers=2),
}


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    init_weights(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:  # norms and balancing biases away from their starting values
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    added = [{"id": 60 + i, "content": name} for i, name in enumerate(["<bos>", "<eos>", "<pad>"])]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>", "chat_template": "{{x}}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def export(folder: Path, model: Transformer, tokenizer_folder: Path, **options) -> Path:
    folder.mkdir()
    save_hf(
        folder, model.config, model.state_dict(), tokenizer_folder=tokenizer_folder, model_card="# card\n", **options
    )
    return folder


TOKENS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_our_folder_and_gives_our_logits(variant, tmp_path, tokenizer_folder):
    from transformers import AutoModelForCausalLM

    model = build(VARIANTS[variant])
    folder = export(tmp_path / "hf", model, tokenizer_folder)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    extra = tuple(
        f"model.layers.{model.config.num_hidden_layers + k}." for k in range(model.config.num_nextn_predict_layers)
    )
    assert all(key.startswith(extra) for key in info["unexpected_keys"])
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["base", "yarn_groups_scaling"])
def test_we_read_what_transformers_saves_and_give_its_logits(variant, tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = VARIANTS[variant]
    torch.manual_seed(0)
    keys = {k: v for k, v in to_hf(config).items() if k != "rope_scaling"}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**keys)).float().eval()
    for layer in theirs.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(8) * 0.3)
    theirs.save_pretrained(tmp_path)
    read, state = load_hf(tmp_path)
    assert read == dataclasses.replace(config, num_nextn_predict_layers=0)  # transformers does not save MTP
    model = Transformer(read)
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["base", "all_moe_two_mtp"])
def test_mtp_hidden_states_equal_transformers(variant, tmp_path, tokenizer_folder):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    model = build(VARIANTS[variant])
    config = model.config
    folder = export(tmp_path / "hf", model, tokenizer_folder)
    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = load_file(folder / "model.safetensors")
    oracle = MtpModel(main, config.num_nextn_predict_layers).float().eval()
    for depth, layer in enumerate(oracle.layers):
        published = {
            k: v for k, v in stored.items() if k.startswith(f"model.layers.{config.num_hidden_layers + depth}.")
        }
        layer.load_state_dict(oracle_state(published, depth, config))
    length = TOKENS.shape[1]
    with torch.no_grad():
        rotation, mask = model.context(None, length)
        embedded, embeddings = model.embed(TOKENS)
        hidden = model.norm(model.run_layers(embedded, rotation, mask))
        ours = model.predict_ahead(hidden, embeddings, None)
        theirs = main.model(TOKENS).last_hidden_state
        torch.testing.assert_close(hidden, theirs, rtol=1e-5, atol=1e-5)
        for depth in range(config.num_nextn_predict_layers):
            shift = depth + 1
            # Rotary attention sees only differences of positions, so counting from `shift` or from 0 is the same.
            positions = torch.arange(shift, length)[None]
            theirs = oracle.forward_layer(
                depth, theirs[:, : length - shift], positions, None, input_ids=TOKENS[:, shift:]
            )
            torch.testing.assert_close(ours[depth][:, : length - shift], theirs, rtol=1e-5, atol=1e-5)


def oracle_state(published: dict[str, torch.Tensor], depth: int, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Published names of one MTP layer -> names inside transformers' MtpModel layer."""
    with torch.device("meta"):
        whole = Transformer(config).state_dict()
    slots = published_slots(config, whole)
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in published.items():
        slot = slots[name]
        if not slot.shared:
            parameter = ours.setdefault(slot.name, torch.empty(whole[slot.name].shape))
            slot.view(parameter).copy_(tensor)
    top = {"enorm", "hnorm", "eh_proj"}
    out = {}
    for name, tensor in ours.items():
        rest = name.removeprefix(f"mtp.{depth}.")
        rest = rest.replace("block.", "mtp_block.").replace("shared_head_norm", "post_norm")
        assert rest.split(".")[0] in top | {"mtp_block", "post_norm"}, rest
        out[rest] = tensor
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
def test_round_trip_is_bit_identical(variant, max_shard_bytes, tmp_path, tokenizer_folder):
    model = build(VARIANTS[variant])
    folder = export(tmp_path / "hf", model, tokenizer_folder, max_shard_bytes=max_shard_bytes)
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_bytes == 40_000)
    config, state = load_hf(folder)
    assert config == model.config
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_shards_are_read_by_transformers(tmp_path, tokenizer_folder):
    from transformers import AutoModelForCausalLM

    model = build(BASE)
    folder = export(tmp_path / "hf", model, tokenizer_folder, max_shard_bytes=40_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all((folder / f).stat().st_size < 60_000 for f in index["weight_map"].values())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_published_names_are_deepseeks():
    names = to_published(BASE, Transformer(BASE).state_dict()).keys()
    for expected in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.experts.7.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.shared_head.norm.weight",
        "model.layers.3.shared_head.head.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
        "model.layers.3.input_layernorm.weight",
    ):
        assert expected in names
    assert not any(".experts.gate_up_proj" in name or "mtp" in name or "block" in name for name in names)
    assert not any(
        n.startswith("model.layers.3.") for n in to_published(BASE, Transformer(BASE).state_dict(), mtp=False)
    )


def test_bfloat16_keeps_the_balancing_bias_in_fp32(tmp_path, tokenizer_folder):
    from safetensors.torch import load_file

    model = build(BASE)
    folder = export(tmp_path / "hf", model, tokenizer_folder, dtype=torch.bfloat16, generation={"temperature": 0.6})
    kinds = {name.endswith("bias"): tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"], config["scoring_func"]) == ("bfloat16", 61, "sigmoid")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 60, "eos_token_id": 61, "pad_token_id": 62, "temperature": 0.6}
    assert (folder / "README.md").read_text() == "# card\n"
    assert (
        json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == BASE.max_position_embeddings
    )
    assert special_token_ids(folder) == {"bos_token_id": 60, "eos_token_id": 61, "pad_token_id": 62}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"  model.norm.weight is missing\n.*exclude"),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), r"experts.3.up_proj.weight is missing\n"),
        (lambda t: t.update({"model.odd": torch.ones(1)}), "model.odd is not part of the model"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(3, 2)}),
            r"lm_head.weight has shape \[3, 2\], config.json asks",
        ),
    ],
)
def test_damaged_weights_are_named(damage, message, tmp_path, tokenizer_folder):
    from safetensors.torch import load_file, save_file

    folder = export(tmp_path / "hf", build(BASE), tokenizer_folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_hf(folder)

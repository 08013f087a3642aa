"""A GGUF file is read back to the very model it was written from, or refused by the name of what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from model.config import ModelConfig, RopeScaling
from model.convert.folder import Selection
from model.convert.gguf import save_gguf
from model.convert.gguf_read import gguf_config, read_gguf
from model.convert.gguf_vocabulary import write_tokenizer
from model.convert.selected import fresh_parameter
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from tests.evaluation.made_models import EXPORTABLE, save_tokenizer

PLAIN = replace(EXPORTABLE, num_nextn_predict_layers=0)
V32 = {"attention": "dsa", "index_n_heads": 16, "index_head_dim": 64, "index_topk": 8, "num_nextn_predict_layers": 1}
YARN = RopeScaling(factor=40.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707)
V2 = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}


def written(folder: Path, config: ModelConfig, kind: str = "f32") -> tuple[Path, Transformer]:
    model = Transformer(config)
    init_weights(model, config, seed=3)
    path = folder / "model.gguf"
    save_gguf(
        path, config, model.state_dict(), kind=kind, tokenizer_folder=save_tokenizer(folder / "tokenizer"), name="x",
        licence="other",
    )  # fmt: skip
    return path, model


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "rope_scaling": YARN}, V2, V32],
    ids=["v3", "groups_yarn", "v2", "v32_mtp"],
)
def test_config_and_weights_come_back_bit_for_bit(tmp_path, changes):
    config = replace(PLAIN, **changes)
    path, model = written(tmp_path, config)
    again, selected = read_gguf(path)
    said = ("initializer_range", "aux_loss_alpha", "seq_aux", "router_bias_update_rate")  # no such keys in the file
    assert replace(again, **{key: getattr(config, key) for key in said}) == config
    ours = model.state_dict()
    assert selected.state.keys() == ours.keys() and not selected.omitted + selected.missing
    assert all(torch.equal(selected.state[name], ours[name]) for name in ours)


def test_the_tokenizer_comes_back(tmp_path):
    path, _ = written(tmp_path, PLAIN)
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    ours, theirs = load_tokenizer(tmp_path / "tokenizer"), load_tokenizer(write_tokenizer(fields, tmp_path / "again"))
    for text in ("The answer is 1234567890.", "  two  spaces\n\n\tlines \n", "naïve — 漢字 🙂 <think>1</think>"):
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(theirs.encode(text)) == text
    assert theirs.encode_prompt("What is 2+2?") == ours.encode_prompt("What is 2+2?")
    assert (theirs.eos_id, theirs.bos_id, theirs.pad_id) == (ours.eos_id, ours.bos_id, ours.pad_id)


def test_tensors_are_chosen_by_published_names_and_the_others_start_anew(tmp_path):
    path, model = written(tmp_path, PLAIN)
    _, selected = read_gguf(
        path, Selection(exclude=["model.layers.1.mlp.experts.2.up_proj.weight", "lm_head*"]), seed=9
    )
    assert set(selected.omitted) == {"model.layers.1.mlp.experts.2.up_proj.weight", "lm_head.weight"}
    name = "layers.1.mlp.experts.gate_up_proj"
    ours, found = model.state_dict()[name], selected.state[name]
    anew = fresh_parameter(name, ours.shape, ModelConfig(), 9)  # the file does not say how it was initialised
    width = PLAIN.moe_intermediate_size
    assert torch.equal(found[2, width:], anew[2, width:]) and torch.equal(found[2, :width], ours[2, :width])
    assert torch.equal(found[3], ours[3])


def rewritten(path: Path, out: Path, without: str) -> Path:
    """The same file without one tensor."""
    reader = GGUFReader(path)
    w = GGUFWriter(out, "deepseek2")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            w.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name != without:
            w.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return out


def test_what_is_missing_is_refused_by_its_published_name_unless_it_may(tmp_path):
    path, _ = written(tmp_path, PLAIN)
    other = rewritten(path, tmp_path / "other.gguf", "blk.1.attn_k_b.weight")
    with pytest.raises(ValueError, match=r"1 tensors are missing: model\.layers\.1\.self_attn\.kv_b_proj\.weight"):
        read_gguf(other)
    _, selected = read_gguf(other, Selection(allow_missing=["*kv_b_proj*"]), seed=1)
    assert selected.missing == ("model.layers.1.self_attn.kv_b_proj.weight",)
    name = "layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(selected.state[name], fresh_parameter(name, selected.state[name].shape, ModelConfig(), 1))


def test_other_files_are_refused(tmp_path):
    path, _ = written(tmp_path, PLAIN)
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    for changes, said in (
        ({"general.architecture": "llama"}, "architecture 'llama' is not read, only deepseek2 and deepseek32"),
        ({"deepseek2.expert_gating_func": 7}, "expert_gating_func=7"),
        ({"deepseek2.block_count": "two"}, "invalid literal"),
        ({"deepseek2.rope.scaling.type": "linear"}, "'linear' is not read, only 'yarn'"),
    ):
        with pytest.raises(ValueError, match=said):
            gguf_config(path, fields | changes)
    with pytest.raises(ValueError, match=r"deepseek2\.embedding_length is missing"):
        gguf_config(path, {key: value for key, value in fields.items() if not key.endswith("embedding_length")})
    for changes in ({"tokenizer.ggml.pre": "llama-bpe"}, {"tokenizer.ggml.model": "llama"}):
        with pytest.raises(ValueError, match="splits text as"):
            write_tokenizer(fields | changes, tmp_path / "none")

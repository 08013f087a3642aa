"""A Core ML package is converted and read back where coremltools is installed; nothing here runs one."""

from __future__ import annotations

import pytest
import torch

from model.convert.coreml_file import PACKAGE, NotConvertible, coreml_missing, inspect, save_coreml
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from tests.model.convert.test_graph_decoder import MODELS, made


def test_what_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert coreml_missing() == "coremltools: pip install 'ray-pipeline[coreml]'"


@pytest.mark.slow
def test_a_package_holds_the_models_inputs_outputs_and_weights_and_another_model_is_told_apart(tmp_path):
    pytest.importorskip("coremltools")
    tokenizer, folder = tmp_path / "tokenizer", tmp_path / "coreml"
    save_trained(train_bpe(["What is the larger of 12 and 34?"] * 20, 320), tokenizer)
    folder.mkdir()
    model = made(MODELS["groups"] | {"vocab_size": 320, "num_hidden_layers": 2})
    notes = save_coreml(folder, model, tokenizer_folder=tokenizer, model_card="# t\n")
    assert any("was tested with torch up to" in note for note in notes)
    assert (folder / PACKAGE / "Manifest.json").is_file() and (folder / "tokenizer.json").is_file()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(RuntimeError, match="lm_head_weight is not the model's"):
        inspect(folder / PACKAGE, model)
    with pytest.raises(NotConvertible, match="cannot express this architecture"):
        save_coreml(folder, made(MODELS["dsa"]), tokenizer_folder=tokenizer, model_card="# t\n")

"""An ONNX graph is proved by onnxruntime against our model, and what is wrong with one is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.convert.export_kinds import ONNX
from model.convert.graph_folder import INPUTS
from model.convert.onnx_file import FILE, save_onnx
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.evaluation.export_checks import Export, check_export
from ray_pipeline.evaluation.proof import Check, Material
from tests.model.convert.test_graph_decoder import MODELS, made

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
QUESTIONS = ["What is 12 + 34?", "Which is larger, 7 or 11?"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    save_trained(train_bpe(["What is the larger of 12 and 34? Solve this and that."] * 20, 320), folder)
    return folder


def saved(folder: Path, tokenizer_folder: Path, changes: dict) -> tuple[Transformer, list[str]]:
    model = made({"vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 128} | changes)
    folder.mkdir()
    return model, save_onnx(folder, model, tokenizer_folder=tokenizer_folder, model_card="# t\n")


def checked(folder: Path, tokenizer_folder: Path, model: Transformer) -> Check:
    [found] = check_export(Export("onnx", folder, ONNX, model, Material(load_tokenizer(tokenizer_folder), QUESTIONS)))
    return found


def test_a_graph_with_groups_of_experts_passes_and_a_changed_weight_fails(tmp_path, tokenizer_folder):
    folder = tmp_path / "onnx"
    model, notes = saved(folder, tokenizer_folder, MODELS["groups"])
    found = checked(folder, tokenizer_folder, model)
    assert (found.status, found.detail) == ("passed", "") and found.program.startswith("onnxruntime ")
    assert found.figures["max_logprob_difference"] < 1e-4 and found.figures["largest_weight_error"] == 0
    assert found.figures["greedy_answers_different"] == 0
    assert "all 8 experts" in notes[0] and "multi-token" in notes[1]
    onnx.checker.check_model(folder / FILE)
    runs_batches(folder, model)
    other = replace(model.config)
    changed = Transformer(other).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.layers["1"].mlp.experts.down_proj[3] *= 1.01
    found = checked(folder, tokenizer_folder, changed)
    assert found.status == "failed" and "a matrix is" in found.detail


def runs_batches(folder: Path, model: Transformer) -> None:
    """Of any size, and goes on from its own cache."""
    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    caches, _, _, width = session.get_inputs()[2].shape
    ids = torch.randint(0, 320, (3, 17), generator=torch.Generator().manual_seed(0))
    past, logits = np.zeros((caches, 3, 0, width), np.float32), []
    for new in (ids[:, :16], ids[:, 16:]):
        seen = np.ones((3, past.shape[2] + new.shape[1]), np.int64)
        out, past = session.run(None, dict(zip(INPUTS, (new.numpy(), seen, past), strict=True)))
        logits.append(torch.from_numpy(out))
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat(logits, 1), model(ids), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "groups"])
def test_every_architecture_passes(name, tmp_path, tokenizer_folder):
    folder = tmp_path / "onnx"
    model, _ = saved(folder, tokenizer_folder, MODELS[name])
    found = checked(folder, tokenizer_folder, model)
    assert (found.status, found.detail) == ("passed", "")

"""The whole model one tensor at a time is the whole model at once, whatever cut it, and is saved as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from model.parallel.whole_tensors import WholeTensors
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.records.artifacts import load_model, save_model, save_model_by_tensors, weights_digest
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, SGD

LAYOUTS: dict[str, tuple[MeshSizes, dict[str, Any]]] = {
    "dp2-tp2-ep2": (MeshSizes(dp=2, tp=2, ep=2), {}),
    "pp2-dp2-ep2": (MeshSizes(pp=2, dp=2, ep=2), {}),
    "pp2-tp2-zbv": (MeshSizes(pp=2, tp=2), {"schedule": "zbv"}),
    "pp4": (MeshSizes(pp=4), {}),
    "dp2-sp2-zero3": (MeshSizes(dp=2, sp=2), {"zero_stage": 3, "optimizer": SGD}),
}


def saved(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    largest = CONFIG.n_routed_experts * 2 * CONFIG.moe_intermediate_size * CONFIG.hidden_size
    for name, (sizes, options) in LAYOUTS.items():
        engine = Engine(CONFIG, Mesh(sizes), EngineOptions(seed=7, **options))
        whole, at_once = WholeTensors(engine.shards(), engine.mesh), engine.full_state()
        assert list(whole.shapes) == sorted(at_once)
        assert all(shape == at_once[key].shape for key, shape in whole.shapes.items())
        tensors = list(whole)
        if rank:
            assert set(tensors) == {None}, "nobody but rank 0 is given a tensor"
            continue
        numbers = torch.cat([tensor.flatten() for tensor in tensors])
        assert torch.equal(numbers, torch.cat([at_once[key].flatten() for key in whole.shapes]))
        assert max(t.numel() for t in tensors) == largest // sizes.ep, "of experts a rank's"
        save_model_by_tensors(folder / name, CONFIG, whole.shapes, tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    run_ranks(saved, 4, path)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_saved_tensor_by_tensor_is_byte_for_byte_what_one_process_saves(folder, tmp_path, name):
    state = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(seed=7)).full_state()
    save_model(tmp_path / "whole", CONFIG, state)
    assert weights_digest(load_model(folder / name).state_dict()) == weights_digest(state)
    files = [path / "model.safetensors" for path in (folder / name, tmp_path / "whole")]
    bodies = [file.read_bytes() for file in files]
    numbers = [body[8 + int.from_bytes(body[:8], "little") :] for body in bodies]
    assert numbers[0] == numbers[1]

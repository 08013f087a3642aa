"""Checkpoints: what was saved comes back exactly, in any layout; what cannot be loaded is refused by name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.checkpoints.checkpoint import (
    DamagedCheckpoint,
    ForeignCheckpoint,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    step_of,
)
from ray_pipeline.engine.checkpoints.checkpoint_writer import CheckpointWriter
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.errors import UserError
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, OPTIMIZER, make_batch

# Layout: sizes of the axes, ZeRO stage, schedule.
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "pp3": {"pp": 3},
    "pp3-zero3": {"pp": 3, "zero": 3},
    "dp2": {"dp": 2},
    "dp2-zero2": {"dp": 2, "zero": 2},
    "tp2": {"tp": 2},
    "sp2-zero1": {"sp": 2, "zero": 1},
    "pp2-zbv": {"pp": 2, "schedule": "zbv"},
    "dp2-ep2-zero3": {"dp": 2, "ep": 2, "zero": 3},
    "pp2-tp2": {"pp": 2, "tp": 2},
    "pp2-tp2-zero1": {"pp": 2, "tp": 2, "zero": 1},
    "tp2-dp2-ep2": {"tp": 2, "dp": 2, "ep": 2},
    "tp2-dp2-ep2-zero2": {"tp": 2, "dp": 2, "ep": 2, "zero": 2},
    "sp2-dp2-ep4": {"sp": 2, "dp": 2, "ep": 4},
    "dp4-ep2-zero3": {"dp": 4, "ep": 2, "zero": 3},
    "pp2-dp2-ep2-zero3": {"pp": 2, "dp": 2, "ep": 2, "zero": 3},
}


def build(layout: str = "one", seed: int = 0, **changes: Any) -> Engine:
    torch.set_num_threads(1)
    axes = dict(LAYOUTS[layout])
    zero_stage, schedule = axes.pop("zero", 0), axes.pop("schedule", "1f1b")
    options = EngineOptions(optimizer=OPTIMIZER, zero_stage=zero_stage, micro_batch=2, seed=seed, schedule=schedule)
    return Engine(replace(CONFIG, **changes), Mesh(MeshSizes(**axes)), options)


def steps(engine: Engine, first: int, last: int) -> list[float]:
    return [engine.train_step(make_batch(s), CrossEntropy(0.3), 1e-2).loss for s in range(first, last)]


def save(engine: Engine, folder: Path, step: int, keep: int = 9) -> Path:
    with CheckpointWriter(engine.mesh, folder, keep=keep) as writer:
        writer.save(engine, step, {"note": 1.5})
    return list_checkpoints(folder)[-1]


def save_and_go_on(rank: int, folder: str, layouts: list[str]) -> dict[str, tuple[list[float], dict]]:
    """In each of these layouts, which have equally many ranks: two steps, a checkpoint beside the two steps after."""
    out = {}
    for layout in layouts:
        engine = build(layout)
        steps(engine, 0, 2)
        with CheckpointWriter(engine.mesh, Path(folder) / layout, keep=2) as writer:
            writer.save(engine, 2, {"note": 1.5})
            losses = steps(engine, 2, 4)
        out[layout] = losses, engine.full_state()
    return out


def load_and_go_on(rank: int, folder: str, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], tuple]:
    """For each (source, layout): the two steps after the checkpoint that the source wrote."""
    out = {}
    for source, layout in pairs:
        engine = build(layout, seed=7)
        page = load_checkpoint(engine, Path(folder) / source / "step_00000002")
        assert (page["step"], page["extra"]) == (2, {"note": 1.5})
        out[source, layout] = steps(engine, 2, 4), engine.full_state()
    return out


def ranks_of(layout: str) -> int:
    axes = LAYOUTS[layout]
    return axes.get("pp", 1) * axes.get("dp", 1) * axes.get("sp", 1) * axes.get("tp", 1)


def in_worlds(function: Any, folder: Path, jobs: list, layout_of: Any) -> dict:
    """The jobs, those with equally many ranks in one set of processes; results of rank 0."""
    out = {}
    for world in sorted({ranks_of(layout_of(job)) for job in jobs}):
        mine = [job for job in jobs if ranks_of(layout_of(job)) == world]
        out |= run_ranks(function, world, str(folder), mine)[0]
    return out


def check_pairs(folder: Path, pairs: list[tuple[str, str]]) -> None:
    sources = list(dict.fromkeys(source for source, _ in pairs))
    unbroken = in_worlds(save_and_go_on, folder, sources, lambda source: source)
    resumed = in_worlds(load_and_go_on, folder, pairs, lambda pair: pair[1])
    assert len(resumed) == len(pairs)
    for (source, layout), (losses, state) in resumed.items():
        torch.testing.assert_close(losses, unbroken[source][0], rtol=1e-5, atol=0, msg=f"{source} -> {layout}")
        if source == layout:
            assert losses == unbroken[source][0], layout
            for name, tensor in unbroken[source][1].items():
                assert torch.equal(tensor, state[name]), f"{layout}: {name}"


def test_resume_in_this_and_in_another_layout(tmp_path):
    check_pairs(tmp_path, [("tp2", "tp2"), ("tp2", "dp2-ep2-zero3"), ("dp2-ep2-zero3", "tp2")])


PAIRS = [
    ("pp3", "one"), ("pp2-tp2", "dp2-ep2-zero3"), ("sp2-zero1", "pp2-zbv"), ("one", "sp2-dp2-ep4"),
    ("tp2", "pp3"), ("dp4-ep2-zero3", "tp2-dp2-ep2"), ("tp2-dp2-ep2", "dp4-ep2-zero3"), ("sp2-dp2-ep4", "pp2-tp2"),
    ("pp3-zero3", "tp2-dp2-ep2-zero2"), ("tp2-dp2-ep2-zero2", "pp3-zero3"), ("pp2-tp2-zero1", "sp2-zero1"),
    ("pp2-zbv", "dp2-zero2"), ("dp2-zero2", "pp2-tp2-zero1"), ("dp4-ep2-zero3", "one"), ("dp2", "tp2"),
    ("pp2-dp2-ep2-zero3", "tp2"),
]  # fmt: skip


@pytest.mark.slow
def test_resume_in_other_layouts_goes_on_with_the_same_losses(tmp_path):
    check_pairs(tmp_path, PAIRS)


@pytest.mark.slow
def test_resume_in_the_same_layout_is_bit_identical(tmp_path):
    check_pairs(tmp_path, [(layout, layout) for layout in LAYOUTS if layout != "one"])


def test_one_process_needs_no_torch_distributed(tmp_path):
    assert not dist.is_initialized()
    engine = build()
    steps(engine, 0, 1)
    path = save(engine, tmp_path, 1)
    other = build(seed=7)
    load_checkpoint(other, path)
    assert steps(other, 1, 3) == steps(engine, 1, 3)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Checkpoints of steps 1 and 2 of one run."""
    engine = build()
    first = save(engine, tmp_path, 1)
    steps(engine, 0, 1)
    return first, save(engine, tmp_path, 2)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "trainer.json", "manifest.json"])
@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_damaged_or_missing_file_is_named_and_nothing_is_loaded(two, name, how):
    flip(two[1] / name) if how == "damaged" else (two[1] / name).unlink()
    engine = build(seed=7)
    before = engine.full_state()
    with pytest.raises(DamagedCheckpoint, match=rf"step_00000002/.*{how}") as caught:
        load_checkpoint(engine, two[1])
    assert isinstance(caught.value, UserError)
    assert name in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in engine.full_state().items())
    assert newest_whole(two[1].parent, before=two[1]) == two[0]


def test_a_shard_of_another_checkpoint_is_named(two):
    shutil.copy(two[0] / "__0_0.distcp", two[1] / "__0_0.distcp")
    with pytest.raises(DamagedCheckpoint, match=r"step_00000002/__0_0\.distcp: damaged: its SHA-256"):
        load_checkpoint(build(), two[1])


def test_a_folder_under_another_ones_name_is_told(two):
    shutil.rmtree(two[1])
    two[0].rename(two[1])
    with pytest.raises(DamagedCheckpoint, match=r"trainer\.json: of step 1, in the folder of step 2"):
        load_checkpoint(build(), two[1])


def test_the_newest_whole_one_is_looked_for_behind_damaged_ones(tmp_path):
    engine = build()
    paths = [save(engine, tmp_path, step) for step in (1, 2, 3, 4)]
    for path in paths[1:]:
        flip(path / "__0_0.distcp")
    assert newest_whole(tmp_path, before=paths[3]) == paths[0]
    assert newest_whole(tmp_path, before=paths[0]) is None
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(two):
    with pytest.raises(ForeignCheckpoint, match=r"another model: model\.hidden_size is 32 there and 64 here"):
        load_checkpoint(build(hidden_size=64), two[1])
    with pytest.raises(ForeignCheckpoint, match=r"model\.rope_theta is .* there and 5000\.0 here"):
        load_checkpoint(build(rope_theta=5000.0), two[1])


def test_a_checkpoint_whose_tensors_differ_is_refused_with_their_names(two, monkeypatch):
    engine = build()
    state = engine.state()
    name = "model.norm.weight"
    monkeypatch.setattr(engine, "state", lambda: state | {name: torch.zeros(5), "model.extra": torch.zeros(1)})
    with pytest.raises(ForeignCheckpoint, match=r"model\.norm\.weight is \[32\] there and \[5\] here; model\.extra is"):
        load_checkpoint(engine, two[1])


def damage_and_load(rank: int, folder: str) -> str:
    engine = build("dp2")
    path = save(engine, Path(folder), 1)
    if rank == 0:
        flip(path / "__1_0.distcp")
    dist.barrier()
    with pytest.raises(DamagedCheckpoint) as caught:
        load_checkpoint(engine, path)
    return str(caught.value)


def test_ranks_share_the_look_at_the_files_and_all_refuse_alike(tmp_path):
    said = run_ranks(damage_and_load, 2, str(tmp_path))
    assert said[0] == said[1]
    assert "__1_0.distcp: damaged" in said[0]


def test_leftovers_of_a_killed_save_are_not_checkpoints(two):
    folder = two[0].parent
    for name in (".step_00000009.partial", ".step_00000001.old"):
        (folder / name).mkdir()
    assert list_checkpoints(folder) == list(two)
    assert find_damage(two[1]) is None


def test_weights_change_when_training_and_not_when_evaluating():
    engine = build()
    before = engine.full_state()
    engine.evaluate(make_batch(0), CrossEntropy(0.3))
    assert all(torch.equal(t, before[n]) for n, t in engine.full_state().items())
    steps(engine, 0, 1)
    assert any(not torch.equal(t, before[n]) for n, t in engine.full_state().items())

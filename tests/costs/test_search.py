"""The search for a layout against going through all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.costs.fit import judge
from ray_pipeline.costs.hardware_table import Hardware, find_hardware
from ray_pipeline.costs.search import LayoutSearch
from ray_pipeline.costs.timing import least_seconds, mean_work, step_timing
from ray_pipeline.costs.workload import Workload, workload
from ray_pipeline.layout.choice import sizes_up_to
from ray_pipeline.layout.layout import Layout, with_layout
from ray_pipeline.layout.rules import refusal
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import PipelineFields

H100 = find_hardware("h100")
START = Layout(gpus=4, device="cuda")
MICRO_BATCHES = [1, 2, 4, 8]


def recipe() -> PipelineFields:
    changed = {"pretrain.batch_size": 8, "model.num_hidden_layers": 9, "export.gguf": []}
    config = load_config(Path("configs/v3-16b-8xh100.yaml"), changed)
    return config.model_copy(update={"backend": "modal", "stages": ["data_prep", "pretrain"]})


def legal(config: PipelineFields) -> list[Workload]:
    """Every layout of four ranks, in every number of rows that can be at once."""
    out = []
    options = list(
        product(("1f1b", "zbv", "interleaved_1f1b", "dualpipev"), (0, 1, 2, 3), ("none", "selective", "full"))
    )
    for sizes in sizes_up_to(config, 4):
        for schedule, zero, again in options if sizes["gpus"] == 4 else ():
            layout = replace(START, **sizes, schedule=schedule, zero_stage=zero, activation_checkpointing=again)
            for rows in MICRO_BATCHES:
                each = with_layout(config, layout)
                each = each.model_copy(update={"layout": each.layout.model_copy(update={"micro_batch": rows})})
                if rows <= 8 // layout.dp and refusal(each, layout) is None:
                    out.append(workload(each, layout, "pretrain"))
    return out


# So little memory that most layouts do not fit, and so much that all do.
@pytest.mark.parametrize("hardware", [H100, replace(H100, memory=60 * 10**9)], ids=["80 GB", "60 GB"])
def test_it_finds_what_going_through_all_of_them_finds(hardware: Hardware) -> None:
    config = recipe()
    fastest: dict[tuple[int, ...], float] = {}
    for work in legal(config):
        if work.replicas == 1 and work.layout.zero_stage:
            continue  # nothing to share among one
        if judge(work, hardware).fits:
            sizes = tuple(work.layout.sizes().values())
            fastest[sizes] = min(fastest.get(sizes, 1e9), step_timing(work, hardware).seconds)
    found = LayoutSearch(config, "pretrain", hardware, START).run(limit=600)
    assert [one.timing.seconds for one in found.found] == sorted(fastest.values())[:8]
    assert found.tried == found.sizes and all(one.fit.fits for one in found.found)


def test_no_step_is_quicker_than_its_bounds() -> None:
    for work in legal(recipe())[::23]:
        seconds = step_timing(work, H100).seconds
        assert least_seconds(work, H100, reduces=False) <= least_seconds(work, H100) <= seconds * (1 + 1e-9)
        plain = replace(work, layout=replace(work.layout, activation_checkpointing="none"), micro_batch=1)
        assert mean_work(plain, replace(H100, launch=0.0)) <= seconds * (1 + 1e-9)


def test_flags_are_kept_and_what_is_found_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, plan = tmp_path / "found.json", ["plan", "--config", "small", "--hardware", "h100"]
    given = ["--gpus", "8", "--tp-size", "2", "--schedule", "1f1b"]
    assert main([*plan, *given, "--search", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert "No other is faster" in capsys.readouterr().out
    assert all(one["layout"]["tp"] == 2 and one["layout"]["schedule"] == "1f1b" for one in found["found"])
    single = tmp_path / "plan.json"
    assert main([*plan, *found["found"][0]["flags"].split(), "--json", str(single)]) == 0
    assert json.loads(single.read_text())["timing"]["seconds"] == found["found"][0]["timing"]["seconds"]


def test_where_nothing_fits_it_says_what_is_missing(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", "v3-671b", "--gpus", "8", "--pp-size", "8", "--search"]) == 1
    assert "DOES NOT FIT: of " in capsys.readouterr().out

"""Planned bytes of rows are those of real files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ray_pipeline.costs.estimate import make_plan
from ray_pipeline.costs.hardware_table import find_hardware
from ray_pipeline.costs.row_reading import reading
from ray_pipeline.costs.workload import workload
from ray_pipeline.data.rows.loader import PackedRows, row_order
from ray_pipeline.data.rows.packing import Row
from ray_pipeline.data.rows.shards import write_rows
from ray_pipeline.layout.layout import Layout
from ray_pipeline.settings.loading import load_config


@pytest.mark.parametrize("vocab_size", [512, 129280])
def test_a_step_reads_as_many_bytes_as_planned(tmp_path: Path, vocab_size: int) -> None:
    config = load_config(None, {"data.seq_len": 16, "pretrain.batch_size": 12})
    work = workload(config, Layout(gpus=4, dp=4), "pretrain")
    work = replace(work, model=replace(work.model, vocab_size=vocab_size))
    row = Row(np.zeros(17, np.uint32), np.zeros(17, np.uint16), np.ones(17, np.uint8))
    write_rows(tmp_path, [row] * 30, seq_len=16, vocab_size=vocab_size, tokens_per_shard=100)
    rows = PackedRows(tmp_path)
    read = rows.fields(row_order(len(rows), 0, 0, 12, slice(3, 6)))
    planned = reading(work)
    assert planned is not None and planned.rank == sum(field.nbytes for field in read)
    assert planned.node == 4 * planned.rank  # all replicas on one node
    together = reading(replace(work, layout=Layout(gpus=8, dp=4, tp=2)), node=4)
    assert together is not None and together.node == 2 * together.rank


def test_on_2048_ranks_a_rank_reads_its_own_rows() -> None:
    config = load_config(Path("configs/v3-671b.yaml"), {})
    layout = Layout(gpus=2048, pp=16, dp=128, ep=64, zero_stage=1, device="cuda")
    found = make_plan(config, layout, "pretrain", find_hardware("h800")).as_dict()["reading"]
    assert found["rank"] == 15360 // 128 * 4097 * 7 and found["node"] == 8 * found["rank"]
    assert found["storage"] + found["making"] < 0.05


def test_rollouts_are_not_read() -> None:
    assert reading(workload(load_config(None, {}), Layout(), "grpo")) is None

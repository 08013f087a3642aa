"""The held-out loss: of which rows, over which sources, and that it is theirs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.packing import Row, pack_documents, pack_placed
from ray_pipeline.data.rows.shards import RowsManifest, SourceRows, write_rows
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.training import validation
from ray_pipeline.training.validation import MAX_ROWS, sample, shares, validation_loss
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, OPTIMIZER

OBJECTIVE = CrossEntropy(0.3)
LENGTHS = {"prose": (40, range(32)), "numbers": (25, range(32, 64))}  # documents of 17 tokens, and which tokens


def stored(folder: Path, *, apart: bool = True) -> PackedRows:
    """Two sources, the second one of other tokens, one after the other."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for number, (count, vocabulary) in enumerate(LENGTHS.values()):
        drawn = torch.randint(vocabulary.start, vocabulary.stop, (count, 17), generator=generator)
        documents += [(number, row.tolist()) for row in drawn]
    held: Counter[int] = Counter()

    def counted() -> Iterator[Row]:
        for row, source, _ in pack_placed(documents, 16, 0):
            held[source] += 1
            yield row

    rows = counted() if apart else pack_documents((ids for _, ids in documents), 16, 0)
    write_rows(
        folder, rows, seq_len=16, vocab_size=CONFIG.vocab_size, tokens_per_shard=200,
        sources=lambda: {list(LENGTHS)[source]: count for source, count in held.items()},
    )  # fmt: skip
    return PackedRows(folder)


def engine(sizes: MeshSizes = MeshSizes()) -> Engine:  # noqa: B008  frozen
    return Engine(CONFIG, Mesh(sizes), EngineOptions(micro_batch=8))


def loss_of(indices: list[int], rows: PackedRows) -> float:
    one = engine()
    return one.evaluate(one.fitted(rows.take(indices)), OBJECTIVE).metrics["cross_entropy"] / (16 * len(indices))


def test_few_rows_are_all_measured_and_every_source_has_its_figure(tmp_path):
    rows = stored(tmp_path)
    assert rows.manifest.sources == (SourceRows("prose", 40), SourceRows("numbers", 25))
    figures = validation_loss(engine(), rows, OBJECTIVE)
    assert figures["validation_loss"] == pytest.approx(loss_of(list(range(65)), rows), rel=1e-6)
    assert figures["validation_loss/prose"] == pytest.approx(loss_of(list(range(40)), rows), rel=1e-6)
    assert figures["validation_loss/numbers"] == pytest.approx(loss_of(list(range(40, 65)), rows), rel=1e-6)
    assert "validation_mtp_loss" in figures


def test_a_sample_follows_the_whole_and_not_the_first_source(tmp_path, monkeypatch):
    """A model that was trained on the first source: its loss there is nats below that of the whole."""
    rows, one = stored(tmp_path), Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER))
    for step in range(8):
        one.train_step(rows.slice(4 * step, 4 * step + 8), OBJECTIVE, OPTIMIZER.lr)
    whole = validation_loss(one, rows, OBJECTIVE)
    first = whole["validation_loss/prose"]
    monkeypatch.setattr(validation, "MAX_ROWS", 26)
    sampled = validation_loss(one, rows, OBJECTIVE)
    assert whole["validation_loss"] - first > 0.3
    assert abs(sampled["validation_loss"] - whole["validation_loss"]) < 0.05
    assert sampled == validation_loss(one, rows, OBJECTIVE)


def test_rows_whose_source_is_not_known_are_drawn_from_all_of_them(tmp_path):
    rows = stored(tmp_path, apart=False)
    assert rows.manifest.sources == ()
    page = json.loads((tmp_path / "rows.json").read_text())
    del page["sources"], page["seal"]  # as written before sources were told apart
    (tmp_path / "rows.json").write_text(json.dumps(page))
    rows = PackedRows(tmp_path)
    assert {name for name in validation_loss(engine(), rows, OBJECTIVE) if "/" in name} == set()
    (indices, stands_for) = sample(rows.manifest, 16)["all"]
    assert len(set(indices)) == 16 and stands_for == len(rows) / 16
    assert max(indices) > len(rows) * 3 // 4 and indices != list(range(16))


def measured(rank: int, folder: Path) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    validation.MAX_ROWS = 27
    rows = PackedRows(folder)
    return [validation_loss(engine(sizes), rows, OBJECTIVE) for sizes in (MeshSizes(dp=2), MeshSizes(pp=2))]


def test_every_layout_measures_the_same_rows(tmp_path, monkeypatch):
    rows = stored(tmp_path)
    monkeypatch.setattr(validation, "MAX_ROWS", 27)
    want = validation_loss(engine(), rows, OBJECTIVE)
    for figures in run_ranks(measured, 2, tmp_path)[1]:
        assert figures == pytest.approx(want, rel=2e-6)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=12), st.integers(1, 300))
def test_shares_are_proportional_and_none_is_left_out(sizes, most):
    found = shares(sizes, most)
    assert sum(found) == min(most, sum(sizes)) and all(a <= b for a, b in zip(found, sizes, strict=True))
    if most >= len(sizes):
        assert min(found) >= 1
        for count, size in zip(found, sizes, strict=True):
            assert count <= max(1, most * size / sum(sizes) + 1)
    if sum(sizes) <= most:
        assert found == sizes


@given(st.lists(st.integers(1, 900), min_size=1, max_size=6))
def test_rows_of_a_sample_stand_for_all_rows_of_their_source(sizes):
    sources = tuple(SourceRows(f"s{i}", size) for i, size in enumerate(sizes))
    found = sample(RowsManifest(16, sum(sizes), 0, (), sources), MAX_ROWS)
    assert sum(len(rows) for rows, _ in found.values()) == min(MAX_ROWS, sum(sizes))
    start = 0
    for source in sources:
        rows, stands_for = found[source.name]
        assert len(rows) * stands_for == pytest.approx(source.rows)
        assert len(set(rows)) == len(rows) and start <= min(rows) and max(rows) < start + source.rows
        start += source.rows

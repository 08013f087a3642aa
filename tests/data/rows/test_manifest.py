"""The manifest of DATA_PREP, and its unigram entropy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.rows.manifest import unigram_entropy, write_data_manifest
from ray_pipeline.errors import UserError
from ray_pipeline.records.integrity import verify_folder


@given(st.integers(1, 300), st.integers(1, 10**9))
def test_equally_frequent_tokens_have_the_entropy_of_their_number(kinds, times):
    counts = np.zeros(400, np.int64)
    counts[:kinds] = times
    assert unigram_entropy(counts) == pytest.approx(math.log(kinds), abs=1e-9)


def test_entropy_is_that_of_the_distribution():
    assert unigram_entropy(np.array([1, 3, 0])) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert math.isnan(unigram_entropy(np.zeros(3, np.int64)))


def test_every_file_of_the_result_is_listed_and_checked(tmp_path):
    (tmp_path / "sft" / "train").mkdir(parents=True)
    (tmp_path / "sft" / "train" / "a.bin").write_bytes(b"abc")
    (tmp_path / "other.json").write_text("{}")
    for name in ("progress.json", "record.json", "error.log"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "000000.arrow").write_bytes(b"")
    write_data_manifest(tmp_path, {"sft/train": {"rows": 1}}, unigram_entropy=2.5)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"sft/train/a.bin", "other.json"}
    assert set(manifest["datasets"]["sft/train"]["files"]) == {"sft/train/a.bin"}
    assert manifest["unigram_entropy"] == 2.5
    verify_folder(tmp_path)
    (tmp_path / "sft" / "train" / "a.bin").write_bytes(b"abd")
    with pytest.raises(UserError, match=r"a\.bin: damaged"):
        verify_folder(tmp_path)

"""The folder that tests of reading one start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.convert.folders import written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A V3 model with one MTP module, in one file."""
    return written(tmp_path)

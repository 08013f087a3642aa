"""Skips tests marked `gpu` where there is no CUDA device."""

from __future__ import annotations

import pytest
from hypothesis import settings

from ray_pipeline.hardware import count_gpus

# No time limit per example: a machine that runs the tests may be busy, and slow is not wrong.
settings.register_profile("repository", deadline=None)
settings.load_profile("repository")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them before anything runs; machines without a driver never import torch for this."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and count_gpus() == 0:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

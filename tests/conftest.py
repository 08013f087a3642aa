"""The order of test files, and skips of tests marked `gpu` where there is no CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from ray_pipeline.hardware import count_gpus

# No time limit per example: a machine that runs the tests may be busy, and slow is not wrong.
settings.register_profile("repository", deadline=None)
settings.load_profile("repository")

HERE = Path(__file__).parent
# Files of more than about twenty seconds, the longest first: one that began last would keep a single worker busy.
LONGEST = [
    HERE / name
    for name in (
        "pipeline/test_pipeline.py",
        "engine/test_parity.py",
        "dag/test_kill.py",
        "stages/test_data_prep.py",
        "dag/test_workflow.py",
        "engine/test_untouched.py",
        "costs/test_memory.py",
        "engine/test_sparse_parity.py",
        "training/test_faults.py",
        "engine/test_balance_layouts.py",
        "objectives/test_forty_steps.py",
        "verification/test_world.py",
        "training/test_health.py",
        "engine/test_routing_replay.py",
        "engine/test_fp8.py",
        "engine/test_attention_layouts.py",
        "engine/checkpoints/test_checkpoint.py",
        "engine/test_adapters.py",
        "launch/test_frozen_ranks.py",
        "docs/test_pages.py",
        "objectives/test_layouts.py",
        "stages/test_sft.py",
        "data/text/test_corpus.py",
        "data/chat/test_chat_layout.py",
        "stages/test_data_prep_post_training.py",
        "isolation/test_judge.py",
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and skip what needs a GPU before anything runs."""
    missing = [path for path in LONGEST if not path.is_file()]
    assert not missing, f"moved or gone: {missing}"
    place = {path: index for index, path in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and count_gpus() == 0:  # machines without a driver never import torch for this
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

"""Imported once by the process that all ranks are forked from, so that each starts at once."""

from ray_pipeline.engine import engine  # noqa: F401
from scripts.parallel_bench import peer_pipeline, peers  # noqa: F401

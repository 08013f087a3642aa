"""Imported once by the process that all ranks are forked from, so that each starts at once."""

import torch.distributed  # noqa: F401

import ray_pipeline.engine.engine
import scripts.parallel_bench.peers  # noqa: F401

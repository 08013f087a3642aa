"""What a finished evaluation is written to: reporters by name."""

from __future__ import annotations

from ray_pipeline.evaluation.reports.registry import get_reporter, known_reporters, reporter

__all__ = ["get_reporter", "known_reporters", "reporter"]

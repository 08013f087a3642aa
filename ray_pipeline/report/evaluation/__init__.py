"""What a finished evaluation is written to: reporters by name."""

from __future__ import annotations

from ray_pipeline.report.evaluation.formats import get_reporter, known_reporters, reporter

__all__ = ["get_reporter", "known_reporters", "reporter"]

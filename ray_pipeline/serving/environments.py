"""Where engines live that need an environment of their own, and where converted files are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """This program's folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ray-pipeline"

"""manifest.json of DATA_PREP's folder: what each dataset holds, where it came from, and a SHA-256 of every file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.data.rows.shards import MANIFEST as ROWS
from ray_pipeline.data.rows.shards import read_manifest
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import file_sha256, make_again, read_sealed
from ray_pipeline.settings.run_folder import MANIFEST, NOT_OUTPUT_FOLDERS, NOT_OUTPUTS

FORMAT = 1
# Written while the stage runs, or after it, of its attempts and for people to watch; not part of the result.


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Nats per token of the best guess that knows only how often each token occurs.

    Args:
        counts: [vocabulary], how often each token is a target.
    """
    p = counts[counts > 0] / counts.sum()
    return abs(float(-(p * np.log(p)).sum())) if counts.sum() else math.nan


def folder_files(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file below `folder` that belongs to the result, by relative path.

    Shards were hashed when they were written, and are not read again.
    """
    files: dict[str, dict[str, Any]] = {}
    known = {
        rows.parent / file.name: file
        for rows in folder.rglob(ROWS)
        for file in read_manifest(rows.parent, verify=False).files
    }
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if (
            name != MANIFEST
            and name not in NOT_OUTPUTS
            and name.partition("/")[0] not in NOT_OUTPUT_FOLDERS
            and not hidden
        ):
            sha256 = known[path].sha256 if path in known else file_sha256(path)
            files[name] = {"sha256": sha256, "bytes": path.stat().st_size}
    return files


def notices_of(folder: Path) -> list[str]:
    """What DATA_PREP has to say of its sources, as its manifest in `folder` holds it; none for any other stage."""
    path = folder / MANIFEST
    return list(read_sealed(path, make_again(folder)).get("notices", ())) if path.is_file() else []


def write_data_manifest(folder: Path, datasets: Mapping[str, dict[str, Any]], **facts: Any) -> None:
    """Write manifest.json as the last file of the folder; each dataset lists its own files."""
    files = folder_files(folder)
    listed = {
        name: entry | {"files": {path: sums for path, sums in files.items() if path.startswith(name)}}
        for name, entry in datasets.items()
    }
    write_sealed(folder / MANIFEST, {"format": FORMAT, **facts, "datasets": listed, "files": files})

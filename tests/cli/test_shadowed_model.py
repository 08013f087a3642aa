"""A user's own model.py in the working folder does not take the place of this project's package `model`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Python in `folder`, with this project behind it on the path, as where it is installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_every_verb_works_beside_a_model_py(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise SystemExit('mine')")
    for verb in (("plan", "--gpus", "1", "--hardware", "cpu"), ("run", "--dry-run"), ("status", "nothing")):
        done = python(tmp_path, "-m", "ray_pipeline.cli", *verb)
        assert done.returncode == (2 if verb[0] == "status" else 0), done.stderr
        assert "mine" not in done.stderr and "Traceback" not in done.stderr


def test_rays_workers_find_the_package_too(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise SystemExit('mine')")
    code = (
        "import ray; from ray_pipeline.launch.local_ray import start_local_ray\n"
        "from ray_pipeline.settings.chain import chain\n"
        "from ray_pipeline.settings.schema import PipelineFields\n"
        "start_local_ray()\n"
        "print(ray.get(ray.remote(chain).remote(PipelineFields())))"
    )
    done = python(tmp_path, "-c", code)
    assert done.returncode == 0 and "pretrain" in done.stdout, done.stderr


def test_a_model_that_was_imported_before_is_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("")
    done = python(tmp_path, "-c", "import model; import ray_pipeline.settings.schema")
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: {tmp_path / 'model.py'}: is imported as `model`") and "Rename" in said

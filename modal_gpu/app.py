"""For Modal's own command line: the functions of the default settings, and a way to start a recipe.

    modal run modal_gpu/app.py --recipe configs/small.yaml --gpus 3 --gpu-type H100
    modal deploy modal_gpu/app.py

A deployed app is there for other programs: `modal.Function.from_name("ray-pipeline", "train")`. Containers never import
this file. `run --backend modal` is the way with all flags, several hosts among them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from modal_gpu.functions import build_app
from modal_gpu.gpus import Shape
from modal_gpu.launch import execute_in
from ray_pipeline.dag.identity import default_run_name
from ray_pipeline.dag.request import RunRequest
from ray_pipeline.errors import EXIT_FAILED, EXIT_USER_ERROR, StageFailed, UserError
from ray_pipeline.layout.choice import resolve_layout
from ray_pipeline.settings.loading import load_config

_deployed = build_app(
    load_config(None, {"tracking.wandb": False, "backend": "modal"}), Shape(("H100",), 1, 1, 8.0, 65536)
)
app = _deployed.app


@app.local_entrypoint()
def main(recipe: str = "", gpus: int = 1, gpu_type: str = "H100", run_name: str = "", wandb: bool = False) -> None:
    """Run a recipe on one container of GPUs, fetch its outputs and print where they are."""
    given = {"layout.gpus": gpus, "modal.gpu_type": gpu_type, "run_name": run_name or None, "tracking.wandb": wandb}
    try:
        code = _run(Path(recipe) if recipe else None, given)
    except (UserError, StageFailed) as error:
        print(f"Error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    if code:
        sys.exit(code)


def _run(recipe: Path | None, given: dict[str, Any]) -> int:
    config = load_config(recipe, {"backend": "modal", **given}, os.environ)
    config = config.model_copy(update={"run_name": config.run_name or default_run_name(config)})
    return execute_in(RunRequest(config, resolve_layout(config, 0), yes=True), _deployed)

"""For Modal's own command line: the functions of the default settings, and a way to start a recipe.

    modal run modal_gpu/app.py --recipe configs/small.yaml --gpus 3 --gpu-type H100
    modal deploy modal_gpu/app.py

A deployed app is there for other programs: `modal.Function.from_name("ray-pipeline", "train")`. Containers never import
this file. `run --backend modal` is the way with all flags, several hosts among them.
"""

from __future__ import annotations

from modal_gpu.functions import build_app
from modal_gpu.gpus import Shape
from ray_pipeline.settings.loading import load_config

_deployed = build_app(
    load_config(None, {"tracking.wandb": False, "backend": "modal"}), Shape(("H100",), 1, 1, 8.0, 65536)
)
app = _deployed.app


@app.local_entrypoint()
def main(recipe: str = "", gpus: int = 1, gpu_type: str = "H100", run_name: str = "", wandb: bool = False) -> None:
    """Run a recipe on one container of GPUs, fetch its outputs and print where they are."""
    import sys

    from modal_gpu.launch import run_with
    from ray_pipeline.cli.group import guarded

    given = {"layout.gpus": gpus, "modal.gpu_type": gpu_type, "run_name": run_name, "tracking.wandb": wandb}
    code = guarded(lambda: run_with(recipe, {name: value for name, value in given.items() if value != ""}, _deployed))
    if code:
        sys.exit(code)

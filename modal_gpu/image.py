"""The container image: CUDA, the packages installed here at the same versions, this source and the user's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import modal

from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import PipelineFields

PACKAGES = ("model", "ray_pipeline", "modal_gpu")
# The -devel image has nvcc, which DeepSpeed asks for when it loads; torch's wheels on PyPI are of CUDA 13.0.
CUDA_IMAGE = "nvidia/cuda:13.0.1-devel-ubuntu24.04"
PYTHON = "3.11"
_ROOT = Path(__file__).resolve().parent.parent
_EXTRA = re.compile(r'\s*;.*extra\s*==\s*["\'](?P<extra>[^"\']+)["\']')


def declared_dependencies(extras: Sequence[str] = ()) -> list[str]:
    """What the package and these extras require: from pyproject.toml in a checkout, else from the wheel's metadata."""
    pyproject = _ROOT / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        optional = project["optional-dependencies"]
        return [*project["dependencies"], *(text for extra in extras for text in optional[extra])]
    out = []
    for text in importlib.metadata.requires("ray-pipeline") or []:
        found = _EXTRA.search(text)
        if found is None or found["extra"] in extras:
            out.append(text.partition(";")[0].strip())
    return out


def pinned(requirement: str) -> str:
    """`ray[train]>=2.50` -> `ray[train]==2.60.0`: the version installed here, without a local build tag like +cpu.

    Raises:
        UserError: it is not installed here, so nobody knows which version goes with the rest.
    """
    match = re.match(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?", requirement)
    assert match is not None, requirement
    name, extras = match.group(1), match.group(2) or ""
    try:
        version = importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{name}: the settings need it, and it is not installed here, where its version would be taken from. "
            f"`pip install {name}`, then run again."
        ) from None
    return f"{name}{extras}=={version}"


def needed_extras(config: PipelineFields) -> list[str]:
    """The package's extras that these settings use in a container."""
    used = {
        "gym": config.data.prompts.startswith("reasoning_gym:")
        or any(name.startswith("reasoning_gym:") for name in config.grpo.rewards),
        "llama": bool(config.export.gguf) and importlib.util.find_spec("xllamacpp") is not None,
        "tensorboard": config.tracking.tensorboard,
        "mlflow": config.tracking.mlflow,
        "trackio": config.tracking.trackio,
    }
    return [name for name, wanted in used.items() if wanted]


def user_modules(config: PipelineFields) -> list[str]:
    """Top packages of the rewards, tools and `modal.local_modules`, which go along as source.

    Raises:
        UserError: one of them cannot be found here.
    """
    named = [name for name in (*config.grpo.rewards, *config.tools.names) if ":" in name]
    modules = [name.partition(":")[0] for name in named if not name.startswith("reasoning_gym:")]
    tops = sorted({name.partition(".")[0] for name in (*modules, *config.modal.local_modules)} - set(PACKAGES))
    if tops and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in tops:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"modal.local_modules: there is no Python module {name} here. Run from its folder.")
    return tops


def build_image(config: PipelineFields) -> modal.Image:
    """The image for these settings; GPU types and CPUs alike, so that it is built once."""
    requirements = dict.fromkeys(pinned(text) for text in declared_dependencies(needed_extras(config)))
    return (
        modal.Image.from_registry(CUDA_IMAGE, add_python=PYTHON)
        .uv_pip_install(*requirements)
        .add_local_python_source(*PACKAGES, *user_modules(config))
    )

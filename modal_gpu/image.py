"""The container image: CUDA, the packages installed here at the same versions, and this source."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import modal

PACKAGES = ("model", "ray_pipeline", "modal_gpu")
# The -devel image has nvcc, which DeepSpeed asks for when it loads.
CUDA_IMAGE = "nvidia/cuda:12.8.1-devel-ubuntu22.04"
PYTHON = "3.11"
_ROOT = Path(__file__).resolve().parent.parent


def declared_dependencies() -> list[str]:
    """What the package requires: from pyproject.toml in a checkout, from the metadata of an installed wheel."""
    pyproject = _ROOT / "pyproject.toml"
    if pyproject.is_file():
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [text for text in importlib.metadata.requires("ray-pipeline") or [] if "extra ==" not in text]


def pinned(requirement: str) -> str:
    """`ray[train]>=2.50` -> `ray[train]==2.60.0`: the version installed here, without a local build tag like +cpu."""
    match = re.match(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?", requirement)
    assert match is not None, requirement
    name, extras = match.group(1), match.group(2) or ""
    return f"{name}{extras}=={importlib.metadata.version(name).partition('+')[0]}"


def build_image() -> modal.Image:
    """The image. Inside a container, where this module is imported again, a placeholder that is never built."""
    if not modal.is_local():
        return modal.Image.debian_slim(python_version=PYTHON)
    return (
        modal.Image.from_registry(CUDA_IMAGE, add_python=PYTHON)
        .uv_pip_install(*[pinned(text) for text in declared_dependencies()])
        .add_local_python_source(*PACKAGES)
    )

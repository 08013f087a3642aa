"""Files that are whole or absent: written aside, fsynced, renamed. Folders carry a manifest of SHA-256 sums.

Knows nothing of stages. torch is imported where tensors are touched, so that listing a run stays cheap.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig, RopeScaling
from ray_pipeline.errors import UserError
from ray_pipeline.records.integrity import MANIFEST_FORMAT, file_sha256, refuse_foreign_folder, sealed, verify_folder
from ray_pipeline.settings.run_folder import MANIFEST

if TYPE_CHECKING:
    from torch import Tensor

    from model.transformer import Transformer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a place that cannot be written into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise explain_write_error(error, path) from error


def explain_write_error(error: OSError, path: Path) -> UserError | OSError:
    """What the user can do about a failed write; an error that is none of theirs comes back as it is."""
    if error.errno in _FULL:
        return UserError(
            f"{path}: the disk is full ({error.strerror}). Nothing half-written was kept. Free some space or choose "
            "another --output-dir, then resume."
        )
    if error.errno in _FORBIDDEN:
        return UserError(
            f"{path}: cannot be written ({error.strerror}). Choose another --output-dir, or change its rights."
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path}: a file is in the way of a folder ({error.strerror}). Choose another --output-dir.")
    if error.errno == errno.EISDIR:
        return UserError(f"{path}: a folder is in the way of a file ({error.strerror}). Move it away.")
    return error


def sync_to_disk(path: Path) -> None:
    """fsync a file, or a folder after a rename inside it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write a file to; it becomes `path` when the block ends well and vanishes when it does not.

    Args:
        durable: fsync before the rename. Off only for what may be lost with the power (a progress file).
    Raises:
        UserError: full disk or no right to write.
    """
    aside = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            if durable:
                sync_to_disk(aside)
            os.replace(aside, path)
            if durable:
                sync_to_disk(path.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; with a manifest it becomes `folder` when the block ends well, and replaces one made this way.

    Raises:
        UserError: something else is there; full disk or no right to write.
    """
    aside, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    with writing(folder):
        if old.exists() and not folder.exists():  # killed between the two renames below
            old.rename(folder)
        refuse_foreign_folder(folder)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            write_manifest(aside)
            if folder.exists():
                folder.rename(old)
            aside.rename(folder)
            sync_to_disk(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Atomically."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Atomically, indented, with a newline at the end. NaN is written the way Python reads it back."""
    with atomic_path(path, durable=durable) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sealed(path: Path, value: Mapping[str, Any], *, durable: bool = True) -> None:
    """A record with its own checksum, atomically; `integrity.read_sealed` reads it."""
    write_json(path, sealed(value), durable=durable)


def read_json(path: Path) -> Any:
    """The file's value.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Run the stage that writes it again.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}). Delete it and run that stage again.") from None


def write_manifest(folder: Path) -> Path:
    """SHA-256 and size of every file below `folder`, into its manifest.json; the files are on disk when it returns."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    write_sealed(folder / MANIFEST, manifest(manifest_entries(folder, paths)))
    return folder / MANIFEST


def manifest(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a manifest holds: its format, what wrote it, and its files."""
    return {"format": MANIFEST_FORMAT, "made_by": f"ray-pipeline {version('ray-pipeline')}", "files": dict(files)}


def manifest_entries(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a manifest says of some files of `folder`; they are on disk when it returns."""
    files = {}
    for path in sorted(paths):
        sync_to_disk(path)
        entry = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        files[path.relative_to(folder).as_posix()] = entry
    return files


def save_model(folder: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """model.safetensors, config.json (a plain ModelConfig) and manifest.json, all or none.

    Raises:
        UserError: full disk or no right to write.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_folder(folder) as aside:
        (aside / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        try:
            save_file({name: _own_memory(tensor) for name, tensor in state.items()}, aside / WEIGHTS)
        except SafetensorError as error:  # it hides the OSError in its text: "... (os error 28)"
            code = next((code for code in _FULL + _FORBIDDEN if f"os error {code})" in str(error)), None)
            if code is None:
                raise
            raise OSError(code, os.strerror(code)) from error


def save_model_by_tensors(
    folder: Path, config: ModelConfig, shapes: Mapping[str, Sequence[int]], tensors: Iterable[Tensor]
) -> None:
    """What `save_model` writes, of fp32 tensors that come one after another.

    Args:
        shapes: by name, in the order in which `tensors` come, each whole or in pieces of its first dimension.
    Raises:
        UserError: full disk or no right to write.
    """
    with atomic_folder(folder) as aside:
        (aside / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight bytes
        with (aside / WEIGHTS).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                file.write(tensor.detach().cpu().contiguous().numpy().data)


def _own_memory(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, and not a view of a larger buffer, which safetensors refuses."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def read_model_config(folder: Path) -> ModelConfig:
    """The ModelConfig that `save_model` wrote."""
    values = read_json(folder / CONFIG)
    scaling = values.pop("rope_scaling")
    return ModelConfig(**values, rope_scaling=None if scaling is None else RopeScaling(**scaling))


def load_model(folder: Path) -> Transformer:
    """The whole model on the CPU, its files checked against the manifest.

    Raises:
        UserError: naming the file that is damaged or missing.
    """
    from safetensors.torch import load_file

    from model.transformer import Transformer

    verify_folder(folder)
    model = Transformer(read_model_config(folder))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model


def weights_digest(source: Mapping[str, Tensor] | Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in order of name: equal exactly when the weights are, bit for bit.

    Args:
        source: a state dict, or a folder that `save_model` wrote.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in _sorted_tensors(source):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sorted_tensors(source: Mapping[str, Tensor] | Path) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(source, Path):
        yield from sorted(source.items())
        return
    from safetensors import safe_open

    with safe_open(source / WEIGHTS, framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)

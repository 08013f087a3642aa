"""GGUF files as the engines need them: a given one checked, one of our models made and kept in a cache folder."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ray_pipeline.errors import UserError, first_line
from ray_pipeline.serving.engines import ServedModel
from ray_pipeline.serving.environments import cache_folder

if TYPE_CHECKING:
    from gguf import GGUFReader

    from model.transformer import Transformer
    from ray_pipeline.evaluation.model_source import ModelSource

MAGIC = b"GGUF"


def check_gguf_file(path: Path) -> GGUFReader:
    """Refuse what llama.cpp could not load, as far as the header tells.

    Returns:
        The file, its header read.
    Raises:
        UserError: not a GGUF file, or a part of one.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise UserError(f"{path}: is not a GGUF file (it does not begin with GGUF). Give the file as published.")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:  # noqa: BLE001  the reader indexes into the file and raises whatever comes of that
        raise UserError(
            f"{path}: the GGUF file is damaged or cut off ({first_line(error):.200}). Fetch it again."
        ) from None
    ends = [int(t.data_offset) + int(t.n_bytes) for t in reader.tensors]
    if not ends or max(ends) > path.stat().st_size:
        raise UserError(f"{path}: the GGUF file is cut off: its tensors do not all lie within it. Fetch it again.")
    return reader


def gguf_context(path: Path) -> int | None:
    """The context length that the file states."""
    return _stated(path, "context_length")


def gguf_drafts(path: Path) -> bool:
    """Whether the file holds an MTP module, which llama.cpp drafts with."""
    return bool(_stated(path, "nextn_predict_layers"))


def _stated(path: Path, key: str) -> int | None:
    """A number that the file states of its architecture."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.get_field("general.architecture")
    field = None if architecture is None else reader.get_field(f"{architecture.contents()}.{key}")
    return None if field is None else int(field.contents())


def gguf_of(model: ServedModel) -> Path:
    """The model as a GGUF file: the one there is, or one made now, in the user's cache.

    Raises:
        UserError: damaged weights, or an architecture that GGUF cannot hold.
    """
    if model.gguf is not None:
        return model.gguf
    source = model.source
    assert source is not None
    path = cache_folder() / "gguf" / f"{source_digest(source, bos=model.bos)}-f16.gguf"
    if not path.is_file():
        _convert(model, path)
    return path


def _convert(model: ServedModel, path: Path) -> None:
    from model.convert.gguf import save_gguf
    from ray_pipeline.records.artifacts import atomic_path

    with opened(model, "GGUF") as (native, tokenizer, ends), atomic_path(path) as partial:
        save_gguf(
            partial, native.config, native.state_dict(), kind="f16", tokenizer_folder=tokenizer, name=model.name,
            licence="unknown", end_ids=ends,
        )  # fmt: skip


@contextmanager
def opened(model: ServedModel, form: str) -> Iterator[tuple[Transformer, Path, list[int]]]:
    """What is written of a model in another form: its weights, the folder of a tokenizer that begins plain text as the
    model has seen it, and the tokens that end an answer.

    Raises:
        UserError: damaged weights, or what the form, by its name, has no place for.
    """
    from model.convert.tokenizer_start import begins_with_bos, with_bos
    from ray_pipeline.evaluation.models import NativeBackend, load

    source = model.source
    assert source is not None
    loaded = load(source)
    assert isinstance(loaded.backend, NativeBackend)
    with tempfile.TemporaryDirectory() as aside:
        tokenizer = source.tokenizer
        if model.bos and not begins_with_bos(tokenizer):
            tokenizer = with_bos(tokenizer, Path(aside))
        try:
            yield loaded.backend.model.cpu(), tokenizer, sorted(source.eos_ids(loaded.tokenizer))
        except ValueError as error:
            raise UserError(f"{model.name}: cannot be written as {form}: {error}") from None


def source_digest(source: ModelSource, *, bos: bool) -> str:
    """Names the weights and tokenizer: changes when a file of theirs does."""
    digest = hashlib.sha256(f"2 {bos}".encode())
    for folder in (source.folder, source.tokenizer):
        for path in sorted(folder.iterdir()):
            if path.is_file():
                stat = path.stat()
                digest.update(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]

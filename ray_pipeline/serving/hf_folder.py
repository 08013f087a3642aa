"""A model as the Hugging Face folder that other engines read: a given one as it is, one of our own made and kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ray_pipeline.errors import UserError
from ray_pipeline.serving.engines import ServedModel
from ray_pipeline.serving.environments import cache_folder
from ray_pipeline.serving.gguf_file import source_digest


def hf_of(model: ServedModel) -> Path:
    """The folder that there is, or one made now, in bf16, in the user's cache.

    Raises:
        UserError: damaged weights.
    """
    from model.convert.folder import is_native
    from model.convert.weight_files import read_object

    source = model.source
    assert source is not None, "only models with weights of ours or a published folder come here"
    if source.form != "stage" and not is_native(read_object(source.folder / "config.json")):
        return source.folder
    folder = cache_folder() / "hf" / f"{source_digest(source, bos=model.bos)}-bf16"
    if not folder.is_dir():
        _convert(model, folder)
    return folder


def _convert(model: ServedModel, folder: Path) -> None:
    import torch

    from model.convert.hf import save_hf
    from model.convert.tokenizer_start import begins_with_bos, with_bos
    from ray_pipeline.evaluation.models import NativeBackend, load
    from ray_pipeline.records.artifacts import atomic_folder

    source = model.source
    assert source is not None
    loaded = load(source)
    assert isinstance(loaded.backend, NativeBackend)
    native, ends = loaded.backend.model.cpu(), sorted(source.eos_ids(loaded.tokenizer))
    with tempfile.TemporaryDirectory() as aside:
        tokenizer = source.tokenizer
        if model.bos and not begins_with_bos(tokenizer):
            tokenizer = with_bos(tokenizer, Path(aside))
        try:
            with atomic_folder(folder) as partial:
                save_hf(
                    partial, native.config, native.state_dict(), tokenizer_folder=tokenizer, model_card="",
                    dtype=torch.bfloat16, generation={"eos_token_id": ends},
                )  # fmt: skip
        except ValueError as error:
            raise UserError(f"{model.name}: cannot be written as a Hugging Face folder: {error}") from None

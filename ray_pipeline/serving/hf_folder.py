"""A model as the Hugging Face folder that other engines read: a given one as it is, one of our own made and kept."""

from __future__ import annotations

from pathlib import Path

from ray_pipeline.serving.engines import ServedModel
from ray_pipeline.serving.environments import cache_folder
from ray_pipeline.serving.gguf_file import opened, source_digest


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
    from ray_pipeline.records.artifacts import atomic_folder

    with opened(model, "a Hugging Face folder") as (native, tokenizer, ends), atomic_folder(folder) as partial:
        save_hf(
            partial, native.config, native.state_dict(), tokenizer_folder=tokenizer, model_card="",
            dtype=torch.bfloat16, generation={"eos_token_id": ends},
        )  # fmt: skip

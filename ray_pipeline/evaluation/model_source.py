"""Which model a folder holds and how it would be loaded. Reads config files and headers alone, no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.convert.folder import describe, is_native
from model.convert.hf_config import FAMILIES
from model.convert.json_values import short
from model.convert.weight_files import LoadLimits, read_object, stored_tensors
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.errors import UserError
from ray_pipeline.records.integrity import own_damage
from ray_pipeline.settings.post_training import ToolsConfig
from ray_pipeline.settings.run_folder import MANIFEST

CONFIG, GENERATION = "config.json", "generation_config.json"
NO_PICKLE = "transformers reads safetensors only here, because a pickle can run any program"


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Attributes:
        name: what reports call it. folder: its weights. tokenizer: folder of its tokenizer.
        form: "stage": as a training stage saves it; "folder": a published or native folder read into our decoder;
            "transformers": another architecture, run by transformers.
        heldout: the questions that its run held out, if it is of a run.
        max_new_tokens: how long the run lets answers be, if it is of a run.
        tools: what the run lets its models call, if it is of a run.
    """

    name: str
    folder: Path
    tokenizer: Path
    form: Literal["stage", "folder", "transformers"]
    heldout: Path | None = None
    max_new_tokens: int | None = None
    tools: ToolsConfig = field(default_factory=ToolsConfig)

    def read_tokenizer(self) -> ChatTokenizer:
        """The tokenizer with its chat template.

        Raises:
            UserError: missing, damaged, or without end token or template.
        """
        return load_tokenizer(self.tokenizer)

    def eos_ids(self, tokenizer: ChatTokenizer) -> frozenset[int]:
        """Every token that ends an answer: the tokenizer's, and those of generation_config.json or config.json.

        Raises:
            UserError: a file that is damaged, or ids that are none.
        """
        for name in (GENERATION, CONFIG):
            path = self.folder / name
            listed = _read_object(path).get("eos_token_id") if path.is_file() else None
            if listed is not None:
                ids = listed if isinstance(listed, list) else [listed]
                if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in ids):
                    raise UserError(f"{path}: eos_token_id={short(listed)}: must be a token's id, or a list of them.")
                return frozenset({tokenizer.eos_id, *(int(i) for i in ids)})
        return frozenset({tokenizer.eos_id})


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise UserError(str(error)) from None


def describe_folder(path: Path, *, name: str | None = None) -> ModelSource:
    """The model of a folder with config.json, safetensors and a tokenizer.

    Raises:
        UserError: something is missing or damaged, or the architecture is known to nobody.
    """
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path}: holds no model (there is no {CONFIG}). Give a run, a finished stage's folder, or a Hugging Face "
            "folder with config.json, safetensors and tokenizer.json."
        )
    values, name = _read_object(path / CONFIG), name or path.name
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path}: there is no tokenizer.json to ask it with. Copy the model's tokenizer there.")
    if is_native(values) or str(values.get("model_type")) in FAMILIES:
        if found := own_damage(path):
            raise UserError(f"{found}. Export it again, or delete {MANIFEST} there if the change was meant.")
        try:
            describe(path)
        except ValueError as error:
            raise UserError(str(error)) from None
        return ModelSource(name, path, path, "folder")
    _check_transformers(path, values)
    return ModelSource(name, path, path, "transformers")


def _check_transformers(path: Path, values: dict[str, Any]) -> None:
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN
    except ImportError:
        raise UserError(
            f"{path}: model_type={values.get('model_type')!r} needs transformers. Install it: pip install transformers"
        ) from None
    if str(values.get("model_type")) not in KNOWN:
        ours = ", ".join(FAMILIES)
        raise UserError(
            f"{path / CONFIG}: model_type={short(values.get('model_type'))} is neither one of ours ({ours}) nor a "
            "causal language model that the installed transformers knows. Update transformers, or give another folder."
        )
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: there is no safetensors file ({NO_PICKLE}). Save the model as safetensors.")
    try:
        stored = stored_tensors(path, LoadLimits())
    except ValueError as error:
        raise UserError(str(error)) from None
    layers = values.get("num_hidden_layers", values.get("n_layer", 0))
    if not isinstance(layers, int) or layers > len(stored):  # building what is not there would take forever
        raise UserError(
            f"{path / CONFIG}: num_hidden_layers={short(layers)}, but its files hold {len(stored)} tensors: they are "
            "not those of this config. Give the folder as it was published."
        )

"""`--init-from`: the architecture and tokenizer of a model folder as a layer of settings. Reads headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.convert.folder import Selection, describe
from model.convert.weight_files import LoadLimits
from ray_pipeline.errors import UserError
from ray_pipeline.settings.layers import Layer
from ray_pipeline.settings.schema import InitFromConfig

# How a model is trained and how long its rows are, not what its weights mean: may differ from the folder's.
FREE = (
    "aux_loss_alpha", "seq_aux", "router_bias_update_rate", "initializer_range", "initialisation", "embedding_init",
    "head_init", "zero_init_outputs", "max_position_embeddings",
)  # fmt: skip


def selection_of(settings: InitFromConfig) -> Selection:
    """The tensors that the settings ask for."""
    return Selection(tuple(settings.include), tuple(settings.exclude), tuple(settings.allow_missing))


def limits_of(settings: InitFromConfig) -> LoadLimits:
    """What the folder may ask of this machine."""
    return LoadLimits(vocab_size=settings.max_vocab_size, file_bytes=settings.max_file_bytes)


def with_init_from(layers: list[Layer], *, stored: bool = False) -> list[Layer]:
    """Insert the folder's `model` and `tokenizer.name` above the recipe, or below it where the recipe names the folder.

    So the folder outranks the model of a recipe that knows nothing of it; what else is said of the model, on the
    command line, in the environment or by a recipe that names the folder, must agree with it.

    Args:
        layers: command line, environment, recipe.
        stored: the settings are those of a run that has started, which may outlive the folder.
    Raises:
        UserError: no such folder, a config or header that is not right, or a clash.
    """
    groups = [layer.values.get("init_from") for layer in layers]
    index = next((i for i, group in enumerate(groups) if isinstance(group, dict) and group.get("path")), None)
    if index is None:
        return layers
    given: dict[str, Any] = {}
    for group in reversed(groups):
        given |= group if isinstance(group, dict) else {}
    try:
        settings = InitFromConfig.model_validate(given)
    except ValueError:
        return layers  # the schema says what is wrong, with its origin
    path = Path(str(settings.path))
    if stored and not path.is_dir():
        return layers
    if not path.is_dir():
        raise UserError(f"--init-from {path}: no such folder. Give one with config.json and safetensors files.")
    try:
        found = describe(path, selection_of(settings), limits_of(settings))
    except ValueError as error:
        raise UserError(f"--init-from {error}") from None
    above = max(index + 1, len(layers) - 1)
    model = asdict(found.config)
    if not found.native:
        del model["router_bias_update_rate"]
    values: dict[str, Any] = {"model": model, "model_size": None}
    if (path / "tokenizer.json").is_file():
        values["tokenizer"] = {"name": str(path)}
    clashes = [clash for layer in layers[:above] for clash in _clashes(layer, values)]
    if clashes:
        raise UserError(
            f"--init-from {path}: its model is given by its config.json, but\n"
            + "\n".join(f"  - {clash}" for clash in clashes)
            + "\nLeave these keys out, or give another folder."
        )
    if "tokenizer" not in values and not _names_tokenizer(layers[:above]):
        raise UserError(
            f"--init-from {path}: there is no tokenizer.json, and the weights mean nothing under another tokenizer. "
            "Copy the model's tokenizer there, or name it with --set tokenizer.name=FOLDER."
        )
    return [*layers[:above], Layer(f"{path}/config.json", values, {}), *layers[above:]]


def _names_tokenizer(layers: Sequence[Layer]) -> bool:
    groups = (layer.values.get("tokenizer") for layer in layers)
    return any(isinstance(group, dict) and group.get("name", "train") != "train" for group in groups)


def _clashes(layer: Layer, own: dict[str, Any]) -> Iterator[str]:
    if layer.values.get("model_size") is not None:
        yield f"model_size={layer.values['model_size']} asks for another [{layer.origin}]"
    model, tokenizer = layer.values.get("model"), layer.values.get("tokenizer")
    for key, value in (model if isinstance(model, dict) else {}).items():
        if key in own["model"] and key not in FREE and not _agrees(value, own["model"][key]):
            yield f"model.{key}={value} is {own['model'][key]} there [{layer.origin}]"
    name = tokenizer.get("name") if isinstance(tokenizer, dict) else None
    if name is not None and "tokenizer" in own and Path(name).absolute() != Path(own["tokenizer"]["name"]).absolute():
        yield f"tokenizer.name={name} is not the folder's own tokenizer [{layer.origin}]"


def _agrees(given: Any, own: Any) -> bool:
    """Whether a setting, perhaps written as text, means the folder's value."""
    if isinstance(given, dict) and isinstance(own, dict):
        return all(key in own and _agrees(value, own[key]) for key, value in given.items())
    if isinstance(own, int | float) and not isinstance(own, bool) and not isinstance(given, bool):
        try:
            return float(given) == float(own)
        except (TypeError, ValueError):
            return False
    return str(given).lower() == str(own).lower()

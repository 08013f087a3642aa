"""Reads one run's settings: defaults < preset < YAML < environment < flags. Explains all that is wrong at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ray_pipeline.errors import UserError
from ray_pipeline.settings.chain import edited
from ray_pipeline.settings.checks import problems
from ray_pipeline.settings.init_from import with_init_from
from ray_pipeline.settings.layers import Layer, env_layer, find_recipe, flag_layer, with_presets, yaml_layer
from ray_pipeline.settings.messages import explain
from ray_pipeline.settings.run_folder import RUN_FILE
from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields


class LayerSource(PydanticBaseSettingsSource):
    """One layer as a settings source. The environment and YAML are read by `layers`, because pydantic-settings'
    own sources drop unknown names silently and cannot say where a refused value was written."""

    def __init__(self, settings_cls: type[BaseSettings], layer: Layer):
        super().__init__(settings_cls)
        self.layer = layer

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The layer's value for one top-level field."""
        return self.layer.values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Everything the layer sets, unknown keys included, so that they are refused."""
        return self.layer.values


@dataclass(frozen=True)
class Layers:
    """Settings from highest to lowest precedence; defaults are the schema's own."""

    ordered: Sequence[Layer]


class PipelineConfig(PipelineFields, BaseSettings):
    """`PipelineFields` read from layers: `PipelineConfig(layers=Layers([...]))`. Groups merge, lists do not."""

    model_config = SettingsConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The given layers, and nothing from the process's own environment."""
        given: Layers = init_settings()["layers"]
        return tuple(LayerSource(settings_cls, layer) for layer in given.ordered)


def load_config(
    yaml_path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    *,
    max_steps: int | None = None,
    skip: Sequence[str] = (),
    dpo: bool = False,
) -> PipelineFields:
    """The settings of one run, checked.

    Args:
        yaml_path: recipe file or the name of a shipped one; None is the tiny recipe.
        overrides: dotted keys from flags and `--set`.
        env: the environment; only names starting with RAY_PIPELINE_ are read.
        max_steps: upper limit for `steps` of every training stage.
        skip, dpo: stages to leave out of `stages`, and whether DPO joins them.
    Raises:
        UserError: listing every unknown key and impossible value with its origin.
    """
    recipe = find_recipe(yaml_path)
    layers = [flag_layer(overrides or {}), env_layer(env or {}), yaml_layer(recipe)]
    layers = with_presets(with_init_from(layers, stored=(recipe.parent / RUN_FILE).is_file()))
    named = Layer("file name", {"recipe": recipe.stem}, {})
    layers = [_accept_pytorch(layer) for layer in (*layers, named)]
    try:
        loaded = PipelineConfig(layers=Layers(layers))  # type: ignore[call-arg]
    except ValidationError as error:
        raise _refusal(explain(error, layers)) from None
    # A plain PipelineFields: copying or validating a BaseSettings would read its sources again.
    config = PipelineFields(**{name: getattr(loaded, name) for name in PipelineFields.model_fields})
    if skip or dpo:
        config = config.model_copy(update={"stages": edited(config.stages, skip, dpo=dpo)})
    if max_steps is not None:
        config = cap_steps(config, max_steps)
    if found := problems(config):
        raise _refusal(found)
    return config


def _refusal(sentences: Sequence[str]) -> UserError:
    if len(sentences) == 1:
        return UserError(sentences[0])
    return UserError("\n".join([f"{len(sentences)} settings cannot be used:", *(f"  - {text}" for text in sentences)]))


def _accept_pytorch(layer: Layer) -> Layer:
    """`backend: pytorch`, a name other tools use, means auto: PyTorch on whatever device there is."""
    if layer.values.get("backend") != "pytorch":
        return layer
    return Layer(layer.origin, {**layer.values, "backend": "auto"}, layer.names)


def cap_steps(config: PipelineFields, max_steps: int) -> PipelineFields:
    """The same settings with at most `max_steps` steps in every training stage."""
    if max_steps < 1:
        raise UserError(f"--max-steps {max_steps}: must be at least 1.")
    stages = {name: getattr(config, name) for name in TRAINING_STAGES}
    capped = {name: stage.model_copy(update={"steps": min(stage.steps, max_steps)}) for name, stage in stages.items()}
    return config.model_copy(update=capped)


def config_dump(config: PipelineFields) -> dict[str, Any]:
    """The settings as JSON-able values, complete; `load_config` on its YAML gives an equal config."""
    return config.model_dump(mode="json") | {"model": asdict(config.model)}


def config_yaml(config: PipelineFields) -> str:
    """`config_dump` as YAML text, in the schema's order."""
    return yaml.safe_dump(config_dump(config), sort_keys=False, allow_unicode=True, width=120)

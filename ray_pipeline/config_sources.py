"""Where settings come from, each as one nested dict: YAML, environment, command line, preset. No checks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.presets import PRESETS, preset

ENV_PREFIX = "RAY_PIPELINE_"
_HERE = Path(__file__).resolve().parent
# An installed wheel carries the recipes inside the package; a checkout has them beside it.
RECIPE_DIR = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"


@dataclass(frozen=True)
class Layer:
    """Settings of one origin.

    Attributes:
        origin: how a message names it: "configs/tiny.yaml", "environment", "command line".
        values: nested dict, keys as in `PipelineFields`.
        names: dotted key -> how the user wrote it, where that differs ("RAY_PIPELINE_GRPO__BETA").
    """

    origin: str
    values: dict[str, Any]
    names: Mapping[str, str]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML where a key given twice is an error: plain YAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key}" is given twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def find_recipe(path: Path | None) -> Path:
    """The YAML file meant by `--config`: a path, or the name of a shipped recipe; without one, the tiny recipe.

    Raises:
        UserError: no such file and no such recipe.
    """
    if path is None:
        return RECIPE_DIR / "tiny.yaml"
    if path.is_file():
        return path
    bundled = RECIPE_DIR / f"{path.stem}.yaml"
    if path.parent in (Path("."), Path("configs")) and path.suffix in ("", ".yaml") and bundled.is_file():
        return bundled
    if path.is_dir():
        reason = "is a folder"
    else:
        reason = f"no such file{did_you_mean(path.stem, recipe_names())}"
    raise UserError(f"--config {path}: {reason}. Give a YAML file, or one of the recipes {', '.join(recipe_names())}.")


def yaml_layer(path: Path) -> Layer:
    """Settings of a YAML file.

    Raises:
        UserError: unreadable, not UTF-8, or not YAML (with the line), or not a mapping at the top.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: not valid YAML: {reason}.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f'{path}: must hold "key: value" settings, but holds a {type(values).__name__}.')
    return Layer(str(path), _string_keys(values), {})


def _string_keys(values: dict[Any, Any]) -> dict[str, Any]:
    return {str(k): _string_keys(v) if isinstance(v, dict) else v for k, v in values.items()}


def env_layer(env: Mapping[str, str]) -> Layer:
    """Settings named RAY_PIPELINE_A__B=value; every name with the prefix counts, so typing errors are noticed."""
    ours = [name for name in env if name.startswith(ENV_PREFIX)]
    names = {name.removeprefix(ENV_PREFIX).lower().replace("__", "."): name for name in ours}
    return Layer("environment", nest({key: parse_text(env[name]) for key, name in names.items()}), names)


def flag_layer(overrides: Mapping[str, Any]) -> Layer:
    """Settings of the command line, dotted keys; text values are read like those of the environment."""
    values = {key: parse_text(value) if isinstance(value, str) else value for key, value in overrides.items()}
    return Layer("command line", nest(values), {})


def parse_text(text: str) -> Any:
    """A value written as text. Lists, mappings and null are YAML; all else stays text: `run_name=123` is a name."""
    stripped = text.strip()
    if stripped[:1] in ("[", "{") or stripped.lower() in ("null", "none", "~"):
        try:
            return yaml.safe_load("null" if stripped.lower() == "none" else stripped)
        except yaml.YAMLError:
            return text
    return text


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}.

    Raises:
        UserError: an empty key, or a key that is given both a value and keys below it.
    """
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        parts = key.split(".")
        if not all(parts):
            raise UserError(f'"{key}={value}": a key looks like grpo.beta, with a name on both sides of every dot.')
        inner = out
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UserError(f'"{key}" and "{part}" are both set, but one holds the other; set only one of them.')
        if isinstance(inner.get(parts[-1]), dict):
            raise UserError(f'"{key}" is set as a whole and by its keys; set only one of them.')
        inner[parts[-1]] = dict(value) if isinstance(value, dict) else value
    return out


def with_presets(layers: list[Layer]) -> list[Layer]:
    """Insert the preset of `model_size` just below the layer that names it.

    So `--model-size small` outranks the model keys of a YAML file, and a YAML file's own model keys outrank the
    `model_size` it names. An unknown size inserts nothing: the schema refuses it with its choices.
    """
    for index, layer in enumerate(layers):
        size = layer.values.get("model_size")
        if size is not None:
            known = isinstance(size, str) and size in PRESETS
            added = [Layer(f"preset {size}", preset(size), {})] if known else []
            return layers[: index + 1] + added + layers[index + 1 :]
    return layers

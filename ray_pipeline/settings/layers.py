"""Where settings come from, each as one nested dict: YAML, environment, command line, preset. No checks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_pipeline.errors import UserError, did_you_mean, first_line
from ray_pipeline.settings.presets import PRESETS, preset

_CHECKSUM = "# sha256 of the lines below: "
ENV_PREFIX = "RAY_PIPELINE_"
_SHORT = {"log": "tracking.log_level"}  # names in the environment that are shorter than their key
# Settings need far less. PyYAML reads some 100 KB a second.
MAX_YAML, MAX_DEPTH, MAX_VALUES = 200_000, 40, 100_000
MAX_KEY_PARTS = 12  # "a.b.c" has three
_HERE = Path(__file__).resolve().parent.parent
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


class _Loader(yaml.SafeLoader):
    """YAML of settings: a key given twice is an error (plain YAML keeps the last one silently), dates stay text.

    What plain YAML would raise other errors for, or could be made to run forever by, is a YAMLError too.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The document's nodes, looked through before anything is made of them."""
        root = super().get_single_node()
        if root is not None:
            _check_nodes(root)
        return root

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As plain YAML, which lets int(), dict lookups and the like raise what they raise."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError):
            text = f' "{short_text(node.value)}"' if isinstance(node, yaml.ScalarNode) else ""
            raise yaml.constructor.ConstructorError(
                None, None, f"this is no {node.tag.rpartition(':')[2]}{text}", node.start_mark
            ) from None


_Loader.yaml_implicit_resolvers = {
    letter: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _check_nodes(root: yaml.Node) -> None:
    """Refuse keys given twice, anchors that hold themselves, and more depth or aliases than settings can need."""
    sizes: dict[int, int] = {}  # values that each node would come to, aliases written out
    open_now: list[yaml.Node] = []

    def fail(node: yaml.Node, reason: str) -> None:
        raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)

    def visit(node: yaml.Node) -> int:
        if any(node is outer for outer in open_now):
            fail(node, "an anchor that holds itself")
        if len(open_now) > MAX_DEPTH:
            fail(node, f"nested more than {MAX_DEPTH} deep")
        if id(node) in sizes:
            return sizes[id(node)]
        open_now.append(node)
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        fail(key, f'key "{short_text(key.value)}" is given twice')
                    seen.add(key.value)
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        size = 1 + sum(map(visit, inner))
        if size > MAX_VALUES:
            fail(node, f"more than {MAX_VALUES} values, aliases written out")
        open_now.pop()
        sizes[id(node)] = size
        return size

    visit(root)


def read_yaml(text: str) -> Any:
    """What YAML text holds.

    Raises:
        yaml.YAMLError: whatever is wrong with it.
    """
    if len(text) > MAX_YAML:
        raise yaml.YAMLError(f"{len(text)} characters, more than the {MAX_YAML} that settings may take")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None


def short_text(text: str) -> str:
    """What a message shows of a value."""
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    try:
        there = path.is_file()
    except OSError as error:
        raise UserError(f"--config {short_text(str(path))}: {error.strerror}. Give a YAML file.") from None
    if there:
        return path
    bundled = RECIPE_DIR / f"{path.stem}.yaml"
    if path.parent in (Path("."), Path("configs")) and path.suffix in ("", ".yaml") and bundled.is_file():
        return bundled
    if path.is_dir():
        reason = "is a folder"
    elif path.exists():
        reason = "is no regular file, but a pipe or a device"
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
    if not is_as_written(text):
        raise UserError(
            f"{path}: its settings are not those that its first line has the checksum of: it was changed by hand, or "
            "is damaged. If the change was meant, delete that line (changes are made by --set, too); else put back a "
            "copy of the file."
        )
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{path}{line}: not valid YAML: {reason}.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f'{path}: must hold "key: value" settings, but holds a {type(values).__name__}.')
    return Layer(str(path), _string_keys(values), {})


def with_checksum(text: str) -> str:
    """YAML text with its SHA-256 in a comment before it, which `yaml_layer` holds it against."""
    return f"{_CHECKSUM}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def is_as_written(text: str) -> bool:
    """Whether the text is what its first line has the checksum of; text without one is a person's."""
    first, _, rest = text.partition("\n")
    return not first.startswith(_CHECKSUM) or first[len(_CHECKSUM) :] == hashlib.sha256(rest.encode()).hexdigest()


def _string_keys(values: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): _string_keys_within(value) for key, value in values.items()}


def _string_keys_within(value: Any) -> Any:
    if isinstance(value, list):
        return [_string_keys_within(inner) for inner in value]
    return _string_keys(value) if isinstance(value, dict) else value


def env_layer(env: Mapping[str, str]) -> Layer:
    """Settings named RAY_PIPELINE_A__B=value; every name with the prefix counts, so typing errors are noticed."""
    ours = [name for name in env if name.startswith(ENV_PREFIX)]
    keys = {name: name.removeprefix(ENV_PREFIX).lower().replace("__", ".") for name in ours}
    names = {_SHORT.get(key, key): name for name, key in keys.items()}
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
            value = read_yaml("null" if stripped.lower() == "none" else stripped)
        except yaml.YAMLError:
            return text
        return _string_keys_within(value)
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
        if len(parts) > MAX_KEY_PARTS:
            raise UserError(f'"{short_text(key)}": no setting lies {len(parts)} groups deep.')
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


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b.0": 1}; an empty group or list stays as it is."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    pairs = list(items)
    if not pairs:
        return {prefix: values}
    out: dict[str, Any] = {}
    for key, value in pairs:
        out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out

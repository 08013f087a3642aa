"""Turns what pydantic refuses into sentences: dotted key, value, reason, origin, and what was probably meant."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError

from ray_pipeline.errors import did_you_mean
from ray_pipeline.settings.layers import Layer, short_text
from ray_pipeline.settings.schema import PipelineFields

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument", "no_such_attribute")
MOST_NAMED = 5  # keys that one suggestion lists
_NOT_A_GROUP = ("model_type", "dataclass_type", "model_attributes_type")


def _alternatives(annotation: Any) -> list[Any]:
    """The types a value may have: `X | None` and `Annotated[X, ...]` unwrapped."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [inner for choice in get_args(annotation) for inner in _alternatives(choice)]
    return [annotation]


def _section(annotation: Any) -> type | None:
    """The group of settings behind an annotation, an element's group for a list, or None for a single value."""
    for choice in _alternatives(annotation):
        if get_origin(choice) is list:
            return _section(get_args(choice)[0])
        if isinstance(choice, type) and (issubclass(choice, BaseModel) or dataclasses.is_dataclass(choice)):
            return choice
    return None


def _fields(section: type) -> dict[str, Any]:
    """Names of a group's settings with their annotations."""
    if issubclass(section, BaseModel):
        return {name: info.annotation for name, info in section.model_fields.items()}
    return get_type_hints(section)


@cache
def known_keys() -> dict[str, Any]:
    """Every dotted key there is, groups included, with its annotation. Lists end the walk."""
    out: dict[str, Any] = {}

    def walk(section: type, prefix: str) -> None:
        for name, annotation in _fields(section).items():
            out[prefix + name] = annotation
            inner = _section(annotation)
            if inner is not None and not any(get_origin(c) is list for c in _alternatives(annotation)):
                walk(inner, f"{prefix}{name}.")

    walk(PipelineFields, "")
    return out


def _either(names: Sequence[str]) -> str:
    """`"dpo.beta" or "grpo.beta"`"""
    *others, last = (f'"{name}"' for name in names)
    return f"{', '.join(others)} or {last}" if others else last


def suggest(location: Sequence[int | str]) -> str:
    """`(did you mean "grpo.beta"?)` for an unknown key: this name in other groups, else a sibling, else any key."""
    known, leaf = known_keys(), str(location[-1])
    group = ".".join(str(part) for part in location[:-1])
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return f" (did you mean {_either(elsewhere[:MOST_NAMED])}?)"
    inner = _section(known.get(".".join(str(part) for part in location[:-1] if isinstance(part, str))))
    siblings = list(_fields(inner)) if inner else [name for name in known if "." not in name] if not group else []
    close = did_you_mean(leaf, siblings)
    return close.replace('"', f'"{group}.', 1) if close and group else close or did_you_mean(leaf, known)


def _dig(values: Any, location: Sequence[int | str]) -> bool:
    """Whether nested settings hold something at `location`."""
    for part in location:
        in_dict = isinstance(values, dict) and part in values
        if not in_dict and not (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            return False
        values = values[part]
    return True


def origin_of(location: Sequence[int | str], layers: Sequence[Layer]) -> str:
    """Where the setting at `location` was written: the highest layer that holds it."""
    for layer in layers:
        if _dig(layer.values, location):
            name = layer.names.get(".".join(map(str, location)))
            return f"{layer.origin} {name}" if name else layer.origin
    return "default"


def _short(value: Any) -> str:
    return short_text(repr(value) if isinstance(value, str) and not value.strip() else str(value))


def _sentence(error: Any, layers: Sequence[Layer]) -> str:
    location: tuple[int | str, ...] = error["loc"]
    key = ".".join(map(str, location))
    kind, value = error["type"], error["input"]
    if kind in _UNKNOWN:
        return f"{key}={_short(value)}: unknown key{suggest(location)} [{origin_of(location, layers)}]"
    if kind in ("missing", "missing_argument"):
        return f"{key}: must be given [{origin_of(location[:-1], layers)}]"
    if kind in _NOT_A_GROUP:
        keys = [name for name in known_keys() if name.startswith(f"{key}.")]
        example = f", for example {keys[0]}" if keys else ""
        reason = f"is a group of settings, not one value; set its keys{example}"
    elif kind == "literal_error":
        reason = f"must be {error['ctx']['expected']}{did_you_mean(str(value), _choices(error['ctx']['expected']))}"
    elif isinstance(value, dict) and not kind.startswith("dict"):
        reason = "is a single value and has no keys of its own"
    else:
        reason = error["msg"].replace("Input should be", "must be").replace("Value error, ", "").strip()
        reason = reason[0].lower() + reason[1:]
    return f"{key}={_short(value)}: {reason} [{origin_of(location, layers)}]"


def _choices(expected: str) -> list[str]:
    return [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]


def explain(error: ValidationError, layers: Sequence[Layer]) -> list[str]:
    """One sentence per setting that was refused."""
    return list(dict.fromkeys(_sentence(problem, layers) for problem in error.errors(include_url=False)))

"""Arguments held against a tool's JSON schema, and schemas made from functions. No models."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ray_pipeline.errors import UserError

_TYPES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"
}  # fmt: skip
_SECTION = re.compile(r"^\s*(?:Args|Arguments|Parameters):\s*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^\s*(?P<name>\w+)\s*(?:\([^)]*\))?:\s*(?P<text>.*)$")


def argument_error(schema: Mapping[str, Any], arguments: Any) -> str | None:
    """Why the arguments do not fit the schema, in a line; None where they fit. An unknown argument does not fit.

    Raises:
        ValueError: the schema itself is not valid.
    """
    import jsonschema
    import referencing.exceptions

    # Draft 2020-12 says nothing of unknown arguments; a call with one would fail, so they are errors unless allowed.
    strict = {"additionalProperties": False, **schema} if "properties" in schema else dict(schema)
    try:
        jsonschema.Draft202012Validator.check_schema(strict)
        # An empty registry: a "$ref" to the web must not be fetched.
        validator = jsonschema.Draft202012Validator(strict, registry=referencing.Registry())
        error = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
    except (jsonschema.SchemaError, referencing.exceptions.Unresolvable) as wrong:
        raise ValueError(f"not a JSON schema: {str(wrong).splitlines()[0]}") from None
    if error is None:
        return None
    place = "".join(f"[{part!r}]" for part in error.absolute_path)
    return f"{place + ': ' if place else ''}{error.message}"[:300]


def function_schema(function: Callable[..., Any], name: str) -> tuple[str, dict[str, Any]]:
    """(description, parameters) of a function, from its docstring and its annotated signature.

    Raises:
        UserError: no docstring, or a parameter whose type cannot be written as JSON.
    """
    text = inspect.getdoc(function) or ""
    if not text.strip():
        raise UserError(f'tool "{name}": has no docstring, so a model could not know what it is for. Write one.')
    hints = typing.get_type_hints(function)
    described = _described_arguments(text)
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f'tool "{name}": parameter {parameter} cannot be given by name. Use plain parameters.')
        if parameter.name not in hints:
            raise UserError(f'tool "{name}": parameter {parameter.name} has no type. Annotate it, for example: str.')
        schema = _type_schema(hints[parameter.name], f'tool "{name}": parameter {parameter.name}')
        if parameter.name in described:
            schema["description"] = described[parameter.name]
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    summary = " ".join(_SECTION.split(text)[0].split("\n\n")[0].split())
    return summary, {"type": "object", "properties": properties, "required": required}


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list and arguments:
        return {"type": "array", "items": _type_schema(arguments[0], where)}
    if origin is dict and arguments:
        return {"type": "object", "additionalProperties": _type_schema(arguments[1], where)}
    if origin in (typing.Union, types.UnionType):
        choices = [{"type": "null"} if a is type(None) else _type_schema(a, where) for a in arguments]
        return {"anyOf": choices}
    raise UserError(f"{where} is of type {hint}. Use str, int, float, bool, list, dict, Literal, or unions of them.")


def _described_arguments(text: str) -> dict[str, str]:
    """What a docstring's "Args:" says of each parameter."""
    parts = _SECTION.split(text, maxsplit=1)
    found: dict[str, str] = {}
    for line in parts[1].splitlines() if len(parts) > 1 else []:
        if line and not line[0].isspace():
            break  # the next section
        match = _ARGUMENT.match(line)
        if match:
            found[match["name"]] = match["text"].strip()
    return found

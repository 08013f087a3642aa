"""Arguments held against a tool's JSON schema, and schemas made from functions. No models."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from ray_pipeline.errors import UserError

_SECTION = re.compile(r"^[ \t]*(?:Args|Arguments|Parameters):[ \t]*$", re.MULTILINE)
_TYPED = re.compile(r"^([ \t]*\w+)[ \t]*\([^)\n]*\):", re.MULTILINE)  # "b (float): the second number"


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
    """(description, parameters) of a function, from its docstring and its annotated signature, by transformers.

    Raises:
        UserError: no docstring, or a parameter whose type cannot be written as JSON.
    """
    from transformers.utils import chat_template_utils

    if not (inspect.getdoc(function) or "").strip():
        raise UserError(f'tool "{name}": has no docstring, so a model could not know what it is for. Write one.')
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f'tool "{name}": parameter {parameter} cannot be given by name. Use plain parameters.')
        if parameter.annotation is parameter.empty:
            raise UserError(f'tool "{name}": parameter {parameter.name} has no type. Annotate it, for example: str.')
    try:
        found = chat_template_utils.get_json_schema(_documented(function))["function"]
        parameters: dict[str, Any] = _with_null(found["parameters"])
        argument_error(parameters, {})  # a schema may name a type that is not JSON's
    except (chat_template_utils.TypeHintParsingException, ValueError, NameError) as error:
        reason = " ".join(str(error).partition(", likely")[0].split())
        raise UserError(
            f'tool "{name}": {reason:.200}. Use str, int, float, bool, list, dict, Literal, or unions of them.'
        ) from None
    return " ".join(found["description"].split("\n\n")[0].split()), parameters


def _documented(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a docstring that says something of every parameter, its name at least, as transformers asks."""
    from transformers.utils import chat_template_utils

    text = _TYPED.sub(r"\1:", _SECTION.sub("Args:", inspect.getdoc(function) or ""))
    said = chat_template_utils.parse_google_format_docstring(text)[1] or {}
    undescribed = [name for name in inspect.signature(function).parameters if name not in said]
    if undescribed:
        lines = "".join(f"\n    {name}: {name}" for name in undescribed)
        text = text.replace("\nArgs:", f"\nArgs:{lines}", 1) if "\nArgs:" in text else f"{text}\n\nArgs:{lines}"

    @functools.wraps(function)
    def documented(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    documented.__doc__ = text
    return documented


def _with_null(schema: Any) -> Any:
    """The schema with `null` among the types of what transformers calls nullable, which JSON Schema does not know."""
    if isinstance(schema, list):
        return [_with_null(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    nullable = schema.get("nullable") is True  # else a parameter of that name
    out = {key: _with_null(value) for key, value in schema.items() if not (nullable and key == "nullable")}
    return {"anyOf": [out, {"type": "null"}]} if nullable else out

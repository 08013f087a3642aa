"""A function's signature becomes a JSON schema, and arguments are held against it."""

from __future__ import annotations

import jsonschema
import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.tools.tool_schema import argument_error, function_schema
from tests.tools import made

ADD = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "description": "the first number."},
        "b": {"type": "number", "description": "the second one."},
        "unit": {"type": "string", "enum": ["m", "km"], "description": "of the sum."},
        "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}, "description": "tags"}, {"type": "null"}]},
    },
    "required": ["a"],
}


def test_signature_and_docstring_become_a_schema():
    description, schema = function_schema(made.add, "made:add")
    assert description == "Adds two numbers, and names the unit."
    assert schema == ADD
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"a": 1}, None),
        ({"a": 1, "b": 2, "unit": "km", "tags": ["x"]}, None),
        ({"a": 1, "tags": None}, None),
        ({}, "'a' is a required property"),
        ({"a": "1"}, "['a']: '1' is not of type 'integer'"),
        ({"a": True}, "['a']: True is not of type 'integer'"),
        ({"a": 1, "unit": "mile"}, "['unit']: 'mile' is not one of"),
        ({"a": 1, "tags": [2]}, "['tags']"),
        ({"a": 1, "c": 2}, "'c' was unexpected"),
        ([1], "is not of type 'object'"),
    ],
)
def test_arguments_are_held_against_it(arguments, said):
    error = argument_error(ADD, arguments)
    assert error is None if said is None else said in error


def test_a_tool_without_parameters_takes_none_and_one_that_says_so_takes_more():
    assert argument_error({"type": "object", "properties": {}}, {"a": 1}) is not None
    assert argument_error({"type": "object", "properties": {}, "additionalProperties": True}, {"a": 1}) is None
    assert argument_error({}, {"a": 1}) is None


def test_a_broken_schema_is_no_fault_of_the_arguments():
    with pytest.raises(ValueError, match="not a JSON schema"):
        argument_error({"type": "nonsense"}, {})


def test_a_schema_is_not_fetched_from_the_web():
    with pytest.raises(ValueError, match="not a JSON schema.*example"):
        argument_error({"properties": {"a": {"$ref": "http://example.invalid/schema"}}}, {"a": 1})


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (made.undocumented, "has no docstring"),
        (made.unannotated, "parameter a has no type. Annotate it"),
        (made.strange, "type hint <class 'object'>.*Use str, int"),
        (made.pictures, "not a JSON schema: 'audio'.*Use str, int"),
        (made.many, "cannot be given by name"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused_with_the_reason(function, said):
    with pytest.raises(UserError, match=f'tool "made:f".*{said}'):
        function_schema(function, "made:f")

"""Every number of the schema has two bounds, and what lies beyond them is refused by name before anything starts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from model.config import ModelConfig, RopeScaling
from model.config_rules import BOUNDS, SCALING_BOUNDS
from ray_pipeline.cli import main
from ray_pipeline.cli.group import VERBS, cli
from ray_pipeline.cli.options import FLAG_KEYS
from ray_pipeline.errors import UserError
from ray_pipeline.settings.layers import MAX_YAML, read_yaml
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.schema import PipelineFields
from tests.cli.made_run import make_run


def numbers(node: Any, definitions: dict, path: str = "") -> Iterator[tuple[str, dict]]:
    """Every number in a JSON schema, with its dotted key."""
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]]
    if node.get("type") in ("integer", "number") and "enum" not in node:
        yield path, node
    for inner in node.get("anyOf", []):
        yield from numbers(inner, definitions, path)
    for key, inner in node.get("properties", {}).items():
        yield from numbers(inner, definitions, f"{path}.{key}" if path else key)
    for place, inner in enumerate([*node.get("prefixItems", []), *([node["items"]] if "items" in node else [])]):
        yield from numbers(inner, definitions, f"{path}.{place}")
    if isinstance(node.get("additionalProperties"), dict):
        yield from numbers(node["additionalProperties"], definitions, f"{path}.answer")


SCHEMA = PipelineFields.model_json_schema()
NUMBERS = dict(numbers(SCHEMA, SCHEMA["$defs"]))


def test_every_number_of_the_schema_has_two_bounds() -> None:
    assert len(NUMBERS) > 150
    unbounded = [
        key
        for key, node in NUMBERS.items()
        if not key.startswith("model.")
        and not ({"minimum", "exclusiveMinimum"} & node.keys() and {"maximum", "exclusiveMaximum"} & node.keys())
    ]
    assert unbounded == []
    for kind, bounds in ((ModelConfig, BOUNDS), (RopeScaling, SCALING_BOUNDS)):
        numeric = {f.name for f in fields(kind) if f.type.split(" |")[0] in ("int", "float")}
        assert numeric == set(bounds)
    assert all(low < high and math.isfinite(high) for low, high in (BOUNDS | SCALING_BOUNDS).values())


YARN = {"model.rope_scaling.factor": 2, "model.rope_scaling.original_max_position_embeddings": 64}


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_beyond_their_bounds_are_refused_by_name(key: str) -> None:
    if key.startswith("data.pretrain"):
        written = {"data.pretrain": [{"name": "builtin", "weight": 1e300}]}
    elif ".betas." in key:
        written = {key.removesuffix(key[-2:]): [1e300, 1e300]}
    else:
        written = (YARN if key.startswith("model.rope_scaling") else {}) | {key: "9" * 40}
    with pytest.raises(UserError) as caught:
        load_config(None, written)
    assert key in str(caught.value)
    if not key.startswith(("data.pretrain", "grpo.rewards")) and ".betas." not in key:
        for low in ("-1e30", "nan"):
            with pytest.raises(UserError, match=key.replace(".", r"\.")):
                load_config(None, written | {key: low})


def test_every_number_on_the_command_line_has_a_largest_value() -> None:
    numeric = (click.INT.__class__, click.FLOAT.__class__)
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        for option in command.params:
            known = option.name in FLAG_KEYS or option.name in (
                "max_steps",
                "temperature",
            )  # bounded where they are read
            if isinstance(option.type, (*numeric, click.IntRange, click.FloatRange)) and not known:
                assert getattr(option.type, "max", None) is not None, f"{verb} --{option.name}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "y", "--temperature", "1e-320"], "must be 0, which is greedy, or from 0.001 to 1000"),
        (["eval", "x", "--temperature", "1e9"], "must be 0, which is greedy, or from 0.001 to 1000"),
        (["eval", "x", "--samples", "1000000000000"], "is not in the range"),
        (["generate", "x", "y", "--num-beams", "99999999"], "is not in the range"),
    ],
)
def test_numbers_of_flags_that_cannot_work_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    make_run(tmp_path, "x")
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"layout.timeout_seconds": "1e15"},
        {"model.rope_theta": "-10000"},
        {"grpo.temperature": "1e-320"},
        {"sft.lora.r": "1000000"},
        {"model.num_hidden_layers": "100000000"},
        {"layout.gpus": "9999999999"},
        {"distillation.student.num_hidden_layers": "100000000"},
        {"run_name": "x" * 300},
        {".".join("a" * 5000): "1"},
        {"grpo.rewards": "[" * 5000},
        {"stages": "&a [*a]"},
        {
            "stages": "{a: &a [x,x,x,x,x,x,x,x,x,x], b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], c: &c "
            "[*b,*b,*b,*b,*b,*b,*b,*b]}"
        },
    ],
)
def test_values_that_cannot_work_are_refused_at_once(settings: dict[str, str]) -> None:
    started = time.process_time()
    with pytest.raises(UserError):
        load_config(None, settings)
    assert time.process_time() - started < 5


def test_merge_keys_work_and_dates_stay_text() -> None:
    text = "base: &base {x: 1, y: 2}\nthird: {<<: &mid {<<: *base, x: 3}, z: 4}\nboth: {<<: [*mid, *base]}\n"
    text += "day: 2024-13-45"
    found = read_yaml(text)
    assert found["third"] == {"x": 3, "y": 2, "z": 4} and found["both"] == {"x": 3, "y": 2}
    assert found["day"] == "2024-13-45"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{inner}'] * 9)}]\n" for inner, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "an anchor that holds itself"),
        ("&a {b: {c: *a}}", "an anchor that holds itself"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 40 deep"),
        ("a: !!int abc", 'this is no int "abc"'),
        ("a: !!timestamp 2024-13-45", "this is no timestamp"),
        ("a: !!bool perhaps", "this is no bool"),
        ("a: !!float x", "this is no float"),
        ("a: " + "9" * 5000, "this is no int"),
        ("{<<: 3}", "expected a mapping"),
        ("{x: 1, x: 2}", 'key "x" is given twice'),
        (BOMB, "values, aliases written out"),
        ("#" * (MAX_YAML + 1), "more than the 200000 that settings may take"),
    ],
)
def test_hostile_yaml_is_one_message(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    started = time.process_time()
    assert main(["config-show", "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Error: ") and said in told and "Traceback" not in told
    assert time.process_time() - started < 5


def test_a_path_that_cannot_be_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import os

    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path, said in (
        (pipe, "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path, "is a folder"),
    ):
        assert main(["config-show", "--config", str(path)]) == 2
        assert said in capsys.readouterr().err
    for flag in ("--init-from", "--data", "--sft-data", "--run-name", "--output-dir"):
        assert (
            main(["run", "--dry-run", "--output-dir", str(tmp_path / "runs"), flag, str(tmp_path / ("y" * 300))]) == 2
        )
        told = capsys.readouterr().err
        assert told.startswith("Error: ") and "Traceback" not in told and len(told) < 2000

"""`solve` and `explain` show what a model wrote beside what is known without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.cli import explain, main
from ray_pipeline.cli.model_answer import open_model
from ray_pipeline.cli.solve import worded
from ray_pipeline.evaluation.models import LanguageModel
from tests.cli.made_run import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder)
    return folder


def answers(monkeypatch, text: str) -> None:
    """Let every model answer so."""
    monkeypatch.setattr(LanguageModel, "text", lambda *_: text)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("<think>3x=20-5=15 x=15/3=5</think>x = 5", 0, "VERIFIED: sympy finds x = 5."),
        ("<think>x=20/3</think>6", 1, "WRONG: x = 6 is no solution. The right answer is: x = 5."),
        ("<think>3x=20-5", 1, "CANNOT CHECK: the model was still thinking"),
        ("The answer is blue.", 1, "CANNOT CHECK: the answer is not understood"),
    ],
)
def test_an_equation_is_answered_and_checked(runs, monkeypatch, capsys, text, code, said):
    answers(monkeypatch, text)
    assert main(["solve", "toy:sft", "3x + 5 = 20", "--output-dir", str(runs), "--max-new-tokens", "4"]) == code
    out = capsys.readouterr().out
    assert "Solve 3x+5=20." in out and said in out


def test_the_check_is_plain_data_too(runs, monkeypatch, capsys):
    answers(monkeypatch, "<think>12+30=42</think>42")
    assert main(["solve", "toy", "What is 12+30?", "--json", "--output-dir", str(runs), "--max-new-tokens", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["answer"], found["check"]["status"]) == (["12+30=42"], "42", "VERIFIED")


def test_a_formula_is_asked_as_training_has_it():
    assert worded("3x + 5 = 20") == "Solve 3x+5=20."
    assert worded(" 3 * (4 + 5) ") == "What is 3*(4+5)?"
    assert worded("If 2x+3=7, what is x?") == "If 2x+3=7, what is x?"


def test_a_file_is_explained_beside_its_facts(runs, monkeypatch, capsys, tmp_path):
    path = tmp_path / "f.py"
    path.write_text("def f(a):\n    if a:\n        return 1\n    return 2\n\ndef g():\n    pass\n")
    answers(monkeypatch, "It defines f.")
    words = ["explain", "toy:sft", str(path), "--output-dir", str(runs), "--max-new-tokens", "4"]
    monkeypatch.setattr(explain, "open_model", roomy(open_model))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "It defines f." in out and "2 functions" in out and "not named" in out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(f["name"], f["complexity"], f["mentioned"]) for f in found["facts"]["functions"]] == [
        ("f", 2, True),
        ("g", 1, False),
    ]


def roomy(load):
    """The toy reads 128 tokens, too few for a file with its question."""

    def loaded(*arguments):
        model, source = load(*arguments)
        model.prompt = lambda _: [5, 6, 7]
        return model, source

    return loaded


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["solve", "toy", "  "], "QUESTION is empty"),
        (["solve", "nothing", "1+1"], "neither a run"),
        (["solve", "toy", "1+1", "--temperature", "nan"], "temperature"),
        (["solve", "toy", "1+" * 200 + "1"], "tokens long: toy (sft) reads 128"),
        (["explain", "toy", "none.py"], "no such file"),
        (["explain", "toy", "LONG"], "reads 128, answer included"),
    ],
)
def test_mistakes_are_told(runs, capsys, tmp_path, words, said):
    long = tmp_path / "long.py"
    long.write_text("x = 1\n" * 100)
    words = [str(long) if word == "LONG" else word for word in words]
    assert main([*words, "--output-dir", str(runs)]) == 2
    assert said in capsys.readouterr().err

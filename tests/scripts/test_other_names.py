"""Scripts that are other names for verbs give them what the verbs take."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.cli.made_run import make_run

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize(
    ("script", "given", "verb"),
    [
        ("export_gguf", "--checkpoint RUN", "export RUN --format gguf --out RUN-gguf"),
        (
            "export_gguf",
            "--checkpoint runs/RUN:sft --out d --quantize q8_0",
            "export runs/RUN:sft --format gguf --out d --quantize q8_0",
        ),
        ("inference", "--checkpoint RUN --prompt Once", "generate -- RUN Once"),
        (
            "inference",
            "--checkpoint RUN:sft --prompt Once --seed 3",
            "generate --seed 3 --stage sft -- RUN Once",
        ),
    ],
)
def test_the_verb_is_called(script: str, given: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *given.split()])
    main = runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"]
    called: list[list[str]] = []
    monkeypatch.setitem(main.__globals__, "verb", lambda words: called.append(words) or 0)
    assert main() == 0 and called == [verb.split()]


def test_inference_prints_what_the_model_writes(tmp_path, monkeypatch, capsys) -> None:
    make_run(tmp_path)
    words = [
        "--checkpoint",
        "toy",
        "--prompt",
        "Once upon a time",
        "--max-new-tokens",
        "3",
        "--output-dir",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["inference", *words])
    assert runpy.run_path(str(SCRIPTS / "inference.py"))["main"]() == 0
    assert capsys.readouterr().out.startswith("Once upon a time")

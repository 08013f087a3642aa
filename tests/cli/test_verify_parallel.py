"""`verify-parallel` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.cli import main

PP2 = ["verify-parallel", "--gpus", "2", "--pp-size", "2", "--backend", "cpu", "--steps", "2"]


def test_two_ranks_pass_and_every_figure_is_shown_and_written(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert main([*PP2, "--zero-stage", "1", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "2 CPU ranks over gloo against one process" in text
    for figure in ("loss difference", "grad norm difference", "weight difference"):
        assert f"largest {figure}" in text
    assert "relative, 2e-06 allowed" in text
    assert text.rstrip().splitlines()[-1].startswith("PASS pp=2 ZeRO=1 fp32 adamw")
    written = json.loads(file.read_text())
    assert written["passed"] is True
    [layout] = written["layouts"]
    assert layout["flags"] == "--gpus 2 --pp-size 2 --zero-stage 1"
    assert len(layout["losses"]) == 3 and len(layout["norms"]) == 2
    assert layout["loss"] <= 2e-6 and layout["misrouted"] == 0
    for step, (one, other) in enumerate(layout["losses"][:2], start=1):
        assert f"{step}   {one:.7f}   {other:.7f}" in text, "losses stand side by side"


def test_all_narrowed_to_some_layouts_and_no_difference_allowed(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    narrow = ["--tp-size", "2", "--zero-stage", "0", "--activation-checkpointing", "none"]
    code = main(
        ["verify-parallel", "--all", "--gpus", "2", *narrow, "--tolerance", "0", "--steps", "2", "--backend", "cpu",
         "--json", str(file)]
    )  # fmt: skip
    assert code == 1
    text = capsys.readouterr().out
    assert "FAIL tp=2 fp32 adamw" in text
    assert "loss differs by" in text and "more than 0" in text
    assert "again: verify-parallel --gpus 2 --tp-size 2" in text
    assert "layouts: 1/1" in text and "1 FAIL" in text
    assert "1 FAIL: 0 of 1 pass" in text
    assert "Refused by the table of rules" in text
    assert "schedules with two parts per rank need pp > 1" in text
    written = json.loads(file.read_text())
    assert written["passed"] is False
    assert written["layouts"][0]["wrong"][0].startswith("loss differs by")
    assert {"rule", "flags", "reason"} == written["refused"][0].keys()


def test_every_stage_of_one_layout(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    narrow = ["--dp-size", "2", "--ep-size", "2", "--zero-stage", "0", "--activation-checkpointing", "none"]
    code = main(
        ["verify-parallel", "--stage", "all", "--gpus", "2", *narrow, "--steps", "2", "--backend", "cpu",
         "--json", str(file)]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0, text
    assert "pretrain, sft, dpo, grpo, distillation" in text and "PASS: 5 of 5 pass" in text
    written = json.loads(file.read_text())["layouts"]
    assert [layout["stage"] for layout in written] == ["pretrain", "sft", "dpo", "grpo", "distillation"]
    assert all(layout["passed"] and layout["steps"] == 2 and layout["rows"] == 5 for layout in written)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--all"], "--all: of how many ranks? For example --all --gpus 4."),
        (["--all", "--gpus", "2", "--pp-size", "4"], "--all: no legal layout has the sizes given"),
        (["--gpus", "2", "--tolerance", "abc"], "--tolerance abc: must be a number of at least 0"),
        (["--gpus", "2", "--tolerance", "-1"], "--tolerance -1: must be a number of at least 0"),
        (["--gpus", "2", "--tolerance", "nan"], "--tolerance nan: must be a number of at least 0"),
        (["--gpus", "2", "--precision", "fp33"], '--precision fp33: must be fp32, bf16 or both (did you mean "fp32"'),
        (["--gpus", "2", "--optimizer", "adam"], '--optimizer adam: must be adamw, sgd or both (did you mean "adamw"'),
        (["--stage", "all"], "--stage all: of how many ranks? For example --stage all --gpus 4."),
        (["--gpus", "2", "--stage", "gpro"], "must be pretrain, sft, dpo, grpo, distillation or all (did you mean"),
        (["--gpus", "2048"], "gpus=2048: verifying starts a process for each rank on this machine, at most 64"),
        (["--gpus", "4", "--pp-size", "3"], "is 3 ranks, not 4"),
        (["--pp-size", "2", "--schedule", "zbv", "--zero-stage", "2"], "Nearest layout that works: --gpus 2"),
        (["--gpus", "2", "--backend", "modal"], "layouts are verified on this machine"),
        (["--gpus", "2", "--backend", "cuda"], "2 ranks need as many GPUs; this machine has 0"),
        (["--gpus", "2", "--json", "nowhere/file.json"], "--json nowhere/file.json: is a folder, or lies in none"),
        (["--gpus", "2", "--json", "."], "--json .: is a folder"),
        (["--gpus", "8", "--config", "v3-671b"], "its model has 6"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_pipeline.hardware.count_gpus", lambda: 0)
    monkeypatch.setattr("ray_pipeline.verification.world.Verifier.__enter__", lambda self: pytest.fail("started"))
    assert main(["verify-parallel", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_what_passed_with_this_code_is_not_run_again(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long verification that was broken off goes on; of other code, or other bounds, nothing counts.

    Other code is a changed file among those that the ranks import: verbs are not.
    """
    file = tmp_path / "results.json"
    given = [*PP2, "--zero-stage", "0", "--json", str(file)]
    assert main(given) == 0
    first = json.loads(file.read_text())
    capsys.readouterr()
    narrow = ["--zero-stage", "0", "--activation-checkpointing", "none"]
    assert main(["verify-parallel", "--all", *PP2[1:], *narrow, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    second = json.loads(file.read_text())["layouts"]
    assert len(second) > 1 and [e for e in second if e["case"] == first["layouts"][0]["case"]] == first["layouts"]
    assert f"1 of {len(second)} passed before, with this code: {file}" in text
    assert f"PASS: {len(second)} of {len(second)} pass" in text
    assert main([*given, "--tolerance", "1e-5"]) == 0
    assert "passed before" not in capsys.readouterr().out
    code = json.loads(file.read_text())["code"]
    assert {"model/moe/router.py", "ray_pipeline/engine/engine.py", "ray_pipeline/training/pairs.py"} < set(code)
    assert not any(name.startswith(("ray_pipeline/cli/", "ray_pipeline/report/")) for name in code)
    assert main([*given, "--tolerance", "1e-5"]) == 0
    assert "passed before" in capsys.readouterr().out
    changed = lambda name: "other" if name == "model/moe/router.py" else code.get(name, "")  # noqa: E731
    monkeypatch.setattr("ray_pipeline.verification.written_results.digest", changed)
    assert main([*given, "--tolerance", "1e-5"]) == 0
    assert "passed before" not in capsys.readouterr().out

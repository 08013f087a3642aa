"""`export` writes a stage's model in other kinds, replaces nothing of others', and refuses before it writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader

from model.convert import onnx_file
from ray_pipeline.cli import main
from ray_pipeline.cli.export import known_kinds, read_wanted
from ray_pipeline.evaluation.proof import Check
from ray_pipeline.records.artifacts import load_model, write_manifest
from ray_pipeline.records.integrity import damage
from ray_pipeline.stages import export_model
from tests.cli.made_run import TOY, make_run
from tests.evaluation.made_models import EXPORTABLE


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder, models=("pretrain", "sft"), toy=replace(EXPORTABLE, vocab_size=TOY.vocab_size))
    make_run(folder, "grouped", models=("pretrain",), toy=replace(TOY, attention="gqa", num_key_value_heads=1))
    return folder


def refused(capsys, *arguments) -> str:
    assert main([str(word) for word in arguments]) == 2
    return capsys.readouterr().err


def test_a_refused_kind_is_left_out_and_the_exit_code_says_so(runs, tmp_path, capsys, monkeypatch):
    real = export_model.check_export

    def coarse(export):
        checks = real(export)
        return [replace(c, status="refused", detail="too far") for c in checks] if "q2_k" in export.name else checks

    monkeypatch.setattr(export_model, "check_export", coarse)
    out = tmp_path / "out"
    asked = ["export", "toy:pretrain", "--output-dir", str(runs), "--out", str(out), "--quantize", "q2_k,f32"]
    assert main(asked) == 1
    assert (out / "model-f32.gguf").is_file() and not (out / "model-q2_k.gguf").exists()
    said = capsys.readouterr()
    assert "model-q2_k.gguf: too far" in said.out
    assert said.err.endswith("REFUSED: model-q2_k.gguf: rounding makes another model of it. Choose a finer kind.\n")


def test_onnx_is_written_where_its_packages_are(runs, tmp_path, capsys, monkeypatch):
    words = ["toy:pretrain", "--output-dir", runs, "--out", tmp_path / "out", "--format", "onnx"]
    monkeypatch.setattr(onnx_file, "_PACKAGES", ("no_such_package",))
    said = refused(capsys, "export", *words)
    assert "--format onnx needs no_such_package: pip install 'ray-pipeline[onnx]'" in said
    assert not (tmp_path / "out").exists()


def test_the_asked_kinds_are_written_checked_and_replaced_by_the_next_call(runs, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["export", "toy:pretrain", "--output-dir", str(runs), "--out", str(out)]
    assert main([*asked, "--quantize", "F16,f32", "--format", "gguf"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "model-f16.gguf",
        "model-f32.gguf",
        "model-f16.Modelfile",
        "model-f32.Modelfile",
        "export.json",
        "manifest.json",
    }
    checks = {check["name"]: check["status"] for check in json.loads((out / "export.json").read_text())["checks"]}
    assert checks == {"model-f16.gguf": "passed", "model-f32.gguf": "passed"} and damage(out) is None
    assert "model-f16.gguf" in capsys.readouterr().out
    (folder,) = runs.glob("toy/pretrain-*")
    head = next(t for t in GGUFReader(out / "model-f32.gguf").tensors if t.name == "output.weight")
    assert (head.data == load_model(folder / "model").lm_head.weight.detach().numpy()).all()
    (out / "export.json").rename(out / "checks.json")  # its name in earlier versions
    write_manifest(out)
    assert main([*asked, "--format", "hf", "--quantize", "bfloat16", "--shard-gb", "0.0002"]) == 0
    assert {path.name for path in out.iterdir()} == {"hf", "export.json", "manifest.json"}
    assert json.loads((out / "hf/config.json").read_text())["dtype"] == "bfloat16"
    shards = list((out / "hf").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 210_000 for shard in shards)


def test_nothing_is_put_in_place_where_a_file_is_not_the_model(runs, tmp_path, monkeypatch, capsys):
    failed = Check("hf", "failed", {}, "largest logit difference 3.5 is over 0.001")
    monkeypatch.setattr(export_model, "check_export", lambda export: [failed])
    out = tmp_path / "out"
    assert main(["export", "toy", "--output-dir", str(runs), "--out", str(out), "--format", "hf"]) == 1
    assert "difference 3.5" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_anything_else_is_not_replaced(runs, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (model,) = runs.glob("toy/sft-*/model")  # this program's, with a manifest, and no export
    copy = shutil.copytree(model, tmp_path / "model")
    for out, said in ((tmp_path / "mine", "letter.txt"), (copy, "this verb did not write")):
        text = refused(capsys, "export", "toy", "--output-dir", runs, "--out", out)
        assert said in text
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear" and damage(copy) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy", "--quantize", "q9"], "--quantize q9: not known"),
        (["toy", "--format", "pickle"], "--format pickle: not known. Known are hf, gguf, onnx, coreml"),
        (["toy", "--format", "hf", "--quantize", "f16"], "f16 is a kind of gguf"),
        (["toy", "--quantize", "float32,bfloat16"], "one folder holds one of"),
        (["toy", "--quantize", " , "], "names nothing"),
        (["toy", "--public"], "says how --push makes a repository"),
        (["toy", "--push", "nobody"], '--push "nobody": names no repository'),
        (["toy:grpo"], "has not finished it"),
        (["grouped", "--format", "gguf"], "has no attention=gqa"),
        (["nothing"], "neither a run"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(runs, tmp_path, capsys, arguments, said):
    out = tmp_path / "out"
    assert said in refused(capsys, "export", *arguments, "--output-dir", runs, "--out", out)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_stage_of_a_run_is_shown_the_other_verb(runs, tmp_path, capsys):
    (model,) = runs.glob("toy/sft-*/model")
    (tokenizer,) = runs.glob("toy/data_prep-*/tokenizer")
    folder = shutil.copytree(model, tmp_path / "folder")
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "manifest.json").unlink()
    assert "convert" in refused(capsys, "export", folder, "--out", tmp_path / "out")


def test_the_kinds_are_those_that_the_stage_writes():
    assert known_kinds().items() >= {"f32": "gguf", "q4_k_m": "gguf", "float32": "hf", "fp8": "hf"}.items()
    assert read_wanted(None, None).formats == ("hf", "gguf")
    assert read_wanted(None, "q8_0").formats == ("gguf",)

"""`convert` takes a model through every form and back to the same bits, and says what it left out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ray_pipeline.cli import main
from ray_pipeline.records.artifacts import load_model, write_manifest
from tests.cli.made_run import TOY, make_run
from tests.evaluation.made_models import EXPORTABLE, save_ours, save_qwen


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    groups = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
    toy = replace(EXPORTABLE, vocab_size=TOY.vocab_size, num_nextn_predict_layers=2, **groups)
    make_run(folder, models=("pretrain", "sft"), toy=toy)
    make_run(folder, "grouped", models=("pretrain",), toy=replace(TOY, attention="gqa", num_key_value_heads=1))
    return folder


def done(runs, *arguments) -> int:
    return main(["convert", *map(str, arguments), "--output-dir", str(runs)])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, mtp: bool = True) -> bool:
    names = [name for name in one if mtp or ".layers.4." not in name]  # the second MTP module, behind three layers
    return all(torch.equal(one[name], other[name]) for name in names)


def test_a_run_goes_through_every_form_and_comes_back_bit_for_bit(runs, tmp_path, capsys):
    hf, own, gguf, back = (tmp_path / name for name in ("hf", "own", "model.gguf", "back"))
    assert done(runs, "toy:sft", hf) == 0
    assert done(runs, hf, own) == 0
    (stage,) = runs.glob("toy/sft-*/model")
    ours, read = load_model(stage).state_dict(), load_model(own).state_dict()
    assert ours.keys() == read.keys() and all(torch.equal(ours[name], read[name]) for name in ours)
    assert "not written" not in capsys.readouterr().out
    assert done(runs, own, gguf) == 0
    assert done(runs, gguf, back) == 0
    assert same(load_file(hf / "model.safetensors"), load_file(back / "model.safetensors"), mtp=False)
    out = capsys.readouterr().out
    assert "llama.cpp " in out and "bit for bit" in out and "failed" not in out
    mtp = {name for name in load_file(hf / "model.safetensors") if ".layers.4." in name}
    named = re.findall(r"model\.layers\.4\.[\w.]*", out)
    assert named and set(named) <= mtp, "what a GGUF file has no place for is named"
    assert (hf / "tokenizer.json").is_file() and (back / "tokenizer.json").is_file()


def test_the_metadata_of_a_gguf_file_is_read_once(runs, tmp_path, monkeypatch):
    import gguf

    assert done(runs, "toy:sft", tmp_path / "model.gguf") == 0
    read: list[str] = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path, *more):
            read.append(Path(path).name)
            super().__init__(path, *more)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    assert done(runs, tmp_path / "model.gguf", tmp_path / "back") == 0
    assert read == ["model.gguf"]


def test_what_is_not_taken_is_counted_and_starts_anew(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        done(runs, "toy:sft", out, "--to", "checkpoint", "--exclude", "lm_head*", "--exclude", "model.layers.4.*") == 0
    )
    said = capsys.readouterr().out
    assert "left out: these start as in training, from seed 0: " in said and "lm_head.weight" in said
    (stage,) = runs.glob("toy/sft-*/model")
    ours, found = load_model(stage).state_dict(), load_model(out).state_dict()
    assert torch.equal(ours["embed_tokens.weight"], found["embed_tokens.weight"])
    assert not (found["lm_head.weight"] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy", "OUT", "--exclude", "layers.0*"], "--exclude layers.0*: fits none of the"),
        (["toy", "OUT", "--quantize", "q8_0"], "--quantize q8_0: no kind of hf"),
        (["toy", "OUT.gguf", "--quantize", "q99"], "--quantize q99: no kind of gguf"),
        (["toy", "OUT.gguf", "--to", "hf"], "is a .gguf file"),
        (["toy", "OUT", "--to", "gguf"], "ends with .gguf"),
        (["toy", "OUT", "--to", "onnx"], "'onnx' is not one of"),
        (["none.gguf", "OUT"], "no such file"),
        (["nothing", "OUT"], "neither a run"),
        (["toy", "OUT", "--tokenizer", "nowhere"], "there is no tokenizer.json"),
        (["grouped", "OUT"], "use --to checkpoint"),
        (["grouped", "OUT.gguf"], "has no attention=gqa"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(runs, tmp_path, capsys, arguments, said):
    words = [word.replace("OUT", str(tmp_path / "out")) for word in arguments]
    assert done(runs, *words) == 2
    assert said.lower() in capsys.readouterr().err.lower()
    assert list(tmp_path.iterdir()) == []


def test_other_models_and_files_are_refused(runs, tmp_path, capsys):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "letter.txt").write_text("dear")
    ours = save_ours(tmp_path / "ours")
    (ours / "model.safetensors").write_bytes((ours / "model.safetensors").read_bytes()[:-8])
    assert done(runs, "toy:sft", tmp_path / "model.gguf") == 0
    (tmp_path / "export").mkdir()
    tampered = (tmp_path / "model.gguf").rename(tmp_path / "export" / "model.gguf")
    write_manifest(tampered.parent)
    tampered.write_bytes(tampered.read_bytes()[:-1] + b"x")
    for words, said in (
        ((tampered, tmp_path / "out"), "model.gguf: damaged: its SHA-256 is not the one in the manifest"),
        ((save_qwen(tmp_path / "qwen"), tmp_path / "out"), "none of deepseek_v2, deepseek_v3, deepseek_v32"),
        ((tmp_path / "bad.gguf", tmp_path / "out"), "damaged"),
        (("toy", tmp_path / "there"), "is there already"),
        ((ours, tmp_path / "out"), "cut short"),
    ):
        assert done(runs, *words) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

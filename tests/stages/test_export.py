"""EXPORT writes what each program reads, goes on where it was killed, and fails when a file is not the model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.evaluation.proof import Check
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.artifacts import load_model, save_model
from ray_pipeline.report.summary import figure_text
from ray_pipeline.settings.checks import warnings
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.stages import export, export_model
from tests.evaluation.made_models import EXPORTABLE

QUESTIONS = ["What is 12 + 34?", "Solve x + 5 = 9.", "Which is larger, 7 or 11?"]


def save_stage(folder: Path, **changes) -> StageResult:
    config = ModelConfig(**{**EXPORTABLE.__dict__, **changes})
    model = Transformer(config)
    init_weights(model, config, seed=4)
    save_model(folder / "model", config, model.state_dict())
    return StageResult(folder, {"accuracy": 0.5}, {"input_accuracy": 0.25}, True)


def make_context(run: Path, settings: dict | None = None, **changes) -> StageContext:
    data = run / "data_prep"
    if not data.exists():
        save_trained(train_bpe(["What is the larger of 12 and 34? Solve this."] * 20, 320), data / "tokenizer")
        (data / "prompts").mkdir()
        lines = [json.dumps({"prompt": q, "answer": "1"}) for q in QUESTIONS]
        (data / "prompts" / "heldout.jsonl").write_text("\n".join(lines) + "\n")
        save_stage(run / "grpo", **changes)
        save_stage(run / "distillation", num_hidden_layers=1, num_nextn_predict_layers=0)
    figures = {"accuracy": 0.5}, {"input_accuracy": 0.25}
    inputs = {name: StageResult(run / name, *figures, True) for name in ("grpo", "distillation")} | {
        "data_prep": StageResult(data)
    }
    config = PipelineFields(model=EXPORTABLE, **(settings or {}))
    return StageContext(config, "toy", run, run / "export", inputs, launcher=None)


def read_checks(folder: Path) -> list[dict]:
    return json.loads((folder / "export.json").read_text())["checks"]


def test_every_file_is_written_and_checked(tmp_path):
    result = export.run(make_context(tmp_path))
    folder = tmp_path / "export"
    assert {p.name for p in folder.iterdir()} == {
        "hf",
        "hf-student",
        "model-f32.gguf",
        "model-f16.gguf",
        "model-q8_0.gguf",
        "model-f32.Modelfile",
        "model-f16.Modelfile",
        "model-q8_0.Modelfile",
        "export.json",
        "manifest.json",
        "progress.json",
    }
    checks = {c["name"]: c["status"] for c in read_checks(folder)}
    assert checks["hf"] == checks["hf-student"] == "passed"
    assert result.metrics["hf/max_logprob_difference"] < 1e-4
    assert result.learned is None
    card = (folder / "hf" / "README.md").read_text()
    assert "| accuracy | 0.5 |" in card and "| input_accuracy | 0.25 |" in card
    assert json.loads((folder / "hf-student" / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.parametrize("pretrained", [True, False])
def test_plain_text_begins_as_the_model_has_seen_it(tmp_path, pretrained):
    """With bos where PRETRAIN's documents did, else as the given tokenizer has it; llama.cpp is asked by the stage."""
    stages = ["data_prep", "pretrain", "sft", "grpo", "export"]
    settings = {} if pretrained else {"init_from": {"path": "somewhere"}}
    settings |= {
        "stages": [stage for stage in stages if pretrained or stage != "pretrain"],
        "export": {"gguf": ["f32"]},
    }
    export.run(make_context(tmp_path, settings))
    checks = {c["name"]: c["status"] for c in read_checks(tmp_path / "export")}
    assert set(checks.values()) == {"passed"}
    ours = load_tokenizer(tmp_path / "data_prep" / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export" / "hf")
    begin = [ours.bos_id] if pretrained else []
    assert theirs("the cat")["input_ids"] == begin + ours.encode("the cat")
    fields = GGUFReader(tmp_path / "export" / "model-f32.gguf").fields
    assert bool(fields["tokenizer.ggml.add_bos_token"].contents()) == pretrained


def test_an_architecture_without_a_published_class_is_written_in_our_own_format(tmp_path):
    other = {"attention": "gqa", "num_key_value_heads": 1, "norm": "dyt"}
    context = make_context(tmp_path, **other)
    model = ModelConfig(**{**EXPORTABLE.__dict__, **other})
    context = replace(context, config=context.config.model_copy(update={"model": model}))
    save_stage(tmp_path / "distillation", num_hidden_layers=1, num_nextn_predict_layers=0, **other)
    result = export.run(context)
    folder = tmp_path / "export"
    assert {p.name for p in folder.iterdir()} == {"native", "native-student", "export.json", "progress.json"}
    checks = {c["name"]: c for c in read_checks(folder)}
    assert checks["native"]["status"] == checks["native-student"]["status"] == "passed"
    assert checks["model-f16.gguf"]["status"] == "not run"
    assert checks["model-f16.gguf"]["detail"] == "not written: llama.cpp's deepseek2 has no attention=gqa"
    assert load_model(folder / "native").config == model
    assert figure_text("export", result.metrics) == (
        "2 exports checked in this project's format (transformers has no such class), 3 GGUF not"
    )
    card = (folder / "native" / "README.md").read_text()
    assert "A model with attention=gqa" in card and "library_name" not in card
    again = warnings(context.config)
    assert any("no transformers class has attention=gqa: exported in this project's format" in text for text in again)
    assert any("has no attention=gqa: no GGUF file is written" in text for text in again)


def test_bfloat16_is_compared_with_the_rounded_weights(tmp_path):
    result = export.run(make_context(tmp_path, {"export": {"dtype": "bfloat16", "gguf": []}}))
    assert result.metrics["hf/max_logprob_difference"] < 1e-4
    assert 1e-4 < result.metrics["hf/largest_weight_error"] < 0.004
    assert json.loads((tmp_path / "export/hf/config.json").read_text())["dtype"] == "bfloat16"


def test_the_student_may_be_the_model(tmp_path):
    export.run(make_context(tmp_path, {"export": {"source": "distillation", "gguf": []}}))
    assert json.loads((tmp_path / "export/hf/config.json").read_text())["num_hidden_layers"] == 1
    assert not (tmp_path / "export/hf-student").exists()


def test_a_rerun_keeps_whole_files_and_rewrites_damaged_ones(tmp_path):
    context = make_context(tmp_path)
    export.run(context)
    files = [
        tmp_path / "export" / name
        for name in ("hf/model.safetensors", "hf-student/model.safetensors", "model-f32.gguf")
    ]
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in files}
    with files[0].open("r+b") as damaged:
        damaged.seek(-4, os.SEEK_END)
        damaged.write(b"\x00\x01\x02\x03")
    export.run(context)
    assert {path: path.read_bytes() for path in files} == {path: content for path, (_, content) in before.items()}
    assert [path.stat().st_ino == before[path][0] for path in files] == [False, True, True]


def test_an_export_that_fails_is_not_put_in_place_and_fails_the_stage_with_the_figures(tmp_path, monkeypatch):
    failed = Check("hf", "failed", {"max_logprob_difference": 3.5}, "largest difference 3.5 is over 0.001")
    monkeypatch.setattr(export_model, "check_export", lambda export: [failed])
    with pytest.raises(StageFailed, match=r"hf: largest difference 3\.5 is over 0\.001") as error:
        export.run(make_context(tmp_path, {"export": {"gguf": ["f32"]}}))
    assert '"max_logprob_difference": 3.5' in error.value.details
    assert read_checks(tmp_path / "export")[0]["status"] == "failed"
    assert {p.name for p in (tmp_path / "export").iterdir()} == {"export.json", "progress.json"}


SPARSE = {"attention": "dsa", "index_n_heads": 16, "index_head_dim": 64, "index_topk": 4}


def test_a_kind_so_coarse_that_it_makes_another_model_is_refused_and_named_and_the_others_are_kept(tmp_path):
    """Of sparse attention: rounding makes the indexer choose other tokens."""
    pytest.importorskip("xllamacpp")
    result = export.run(make_context(tmp_path, {"export": {"gguf": ["f32", "q2_k"]}}, **SPARSE))
    checks = {c["name"]: c for c in read_checks(tmp_path / "export")}
    assert checks["model-q2_k.gguf"]["status"] == "refused" and "over 0.1" in checks["model-q2_k.gguf"]["detail"]
    assert checks["model-f32.gguf"]["status"] == checks["hf"]["status"] == "passed"
    there = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"hf", "model-f32.gguf"} < there and not any("q2_k" in name for name in there)
    assert result.metrics["model-q2_k.gguf/refused"] == 1 and result.metrics["checks_not_run"] == 0
    assert figure_text("export", result.metrics) == (
        "3 exports checked, GGUF greedy agreement 100.0% or more; refused: model-q2_k.gguf, of which rounding makes "
        "another model"
    )
    assert "| `model-q2_k.gguf` | llama.cpp" in (tmp_path / "export/hf/README.md").read_text()


def test_nothing_but_refused_kinds_fails_the_stage(tmp_path, monkeypatch):
    refused = Check("model-q2_k.gguf", "refused", {"greedy_agreement": 0.2}, "likeliest token agrees at 20%")
    monkeypatch.setattr(export_model, "check_export", lambda export: [refused])
    context = make_context(tmp_path, {"export": {"gguf": ["q2_k"]}})
    with pytest.raises(StageFailed, match=r"model-q2_k\.gguf: likeliest token agrees at 20%"):
        export.run(context, formats=("gguf",))
    assert {p.name for p in (tmp_path / "export").iterdir()} == {"export.json", "progress.json"}


def test_weights_that_differ_from_the_model_fail_for_real(tmp_path, monkeypatch):
    real = export_model.save_hf

    def wrong(folder, config, state, **options):
        real(folder, config, {k: v * 1.01 if k == "lm_head.weight" else v for k, v in state.items()}, **options)

    monkeypatch.setattr(export_model, "save_hf", wrong)
    with pytest.raises(StageFailed, match=r"a matrix is 1\.00% off, over the 0\.00% of float32"):
        export.run(make_context(tmp_path, {"export": {"gguf": []}}))


def test_rounded_kinds_say_what_they_cost_and_the_model_card_shows_it(tmp_path):
    pytest.importorskip("xllamacpp")
    context = make_context(tmp_path, {"export": {"gguf": ["q4_k_m"]}})
    result = export.run(context)
    assert result.metrics["model-q4_k_m.gguf/questions"] == len(QUESTIONS)
    [found] = [c for c in read_checks(tmp_path / "export") if c["name"] == "model-q4_k_m.gguf"]
    assert found["program"].startswith("llama.cpp (xllamacpp ")
    assert "rounded without an importance matrix: no text was held out" in found["notes"]
    assert any("matrices are Q5_0, not Q4_K" in note for note in found["notes"])
    card = (tmp_path / "export" / "hf" / "README.md").read_text()
    assert "## Proof" in card and "| `model-q4_k_m.gguf` | llama.cpp" in card and "| `hf` | transformers" in card


def test_a_model_gguf_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    context = make_context(tmp_path, q_lora_rank=None)
    with pytest.raises(UserError, match=r"GGUF: q_lora_rank=None.*export\.gguf=\[\]"):
        export.run(context)
    assert not (tmp_path / "export/hf").exists()


def test_a_damaged_upstream_model_is_named(tmp_path):
    context = make_context(tmp_path)
    with (tmp_path / "grpo/model/model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x01\x02\x03")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        export.run(context)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tests.stages import test_export
from ray_pipeline.stages import export, export_model
real = export_model.save_gguf if sys.argv[3] == "gguf" else export_model.save_hf
def die(*args, **options):
    real(*args, **options)  # written aside, not yet in place
    os.kill(os.getpid(), signal.SIGKILL)
setattr(export_model, "save_gguf" if sys.argv[3] == "gguf" else "save_hf", die)
export.run(test_export.make_context(Path(sys.argv[2])))
"""


@pytest.mark.parametrize("where", ["hf", "gguf"])
def test_killed_while_writing_it_resumes_to_the_same_files(where, tmp_path):
    repository = Path(__file__).parents[2]
    make_context(tmp_path / "killed")
    command = [sys.executable, "-c", KILLED, str(repository), str(tmp_path / "killed"), where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = tmp_path / "killed/export" / ("hf" if where == "hf" else "model-f32.gguf")
    assert not left.exists()
    export.run(make_context(tmp_path / "killed"))
    export.run(make_context(tmp_path / "unbroken"))
    for name in ("hf/model.safetensors", "hf-student/model.safetensors", "model-q8_0.gguf"):
        assert (tmp_path / "killed/export" / name).read_bytes() == (tmp_path / "unbroken/export" / name).read_bytes(), (
            name
        )
    assert not [p.name for p in (tmp_path / "killed/export").iterdir() if p.name.startswith(".")]


def test_weights_that_are_no_numbers_are_not_exported(tmp_path):
    context = make_context(tmp_path)
    model = load_model(tmp_path / "grpo" / "model")
    state = model.state_dict()
    state["layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_model(tmp_path / "grpo" / "model", model.config, state)
    with pytest.raises(UserError, match=r"grpo/model: layers\.1\.self_attn\.o_proj\.weight is not finite"):
        export.run(context)
    assert not (tmp_path / "export" / "hf").exists()


def test_a_gguf_file_that_was_damaged_since_is_written_again(tmp_path):
    path = tmp_path / "model-f16.gguf"
    for name in ("model-f32.gguf", path.name):
        (tmp_path / name).write_bytes(bytes(64))
        assert not export_model._is_as_written(tmp_path / name)
        export_model._list_files([tmp_path / name])
        assert export_model._is_as_written(tmp_path / name)
    path.write_bytes(bytes(63) + b"x")
    assert not export_model._is_as_written(path)
    assert export_model._is_as_written(tmp_path / "model-f32.gguf")

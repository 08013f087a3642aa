"""The verb `eval` end to end: runs, stage folders, exported and foreign folders, reports, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.convert.hf import save_hf
from model.generate.decode import Decoder, generate
from ray_pipeline.cli import main
from ray_pipeline.dag.ledger import read_record, write_record
from ray_pipeline.dag.tracked_eval import track_evaluation
from ray_pipeline.data.chat.completion_text import completion_text
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.tasks.question import prepared_questions
from ray_pipeline.evaluation.marking import are_right
from ray_pipeline.evaluation.outcome import Report
from ray_pipeline.evaluation.statistics import wilson_interval
from ray_pipeline.records.artifacts import atomic_folder, load_model
from ray_pipeline.records.metrics_file import read_samples
from ray_pipeline.settings.layers import with_checksum
from ray_pipeline.settings.loading import config_yaml, load_config
from tests.cli.made_run import TOY, finish, make_run
from tests.evaluation.made_models import save_ours, save_qwen

SHORT = ("--max-new-tokens", "8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, model folders and questions."""
    folder = tmp_path_factory.mktemp("place")
    questions = [{"prompt": f"What is {i}+{i}?", "answer": str(2 * i), "category": "ab"[i % 2], "difficulty": 1 + i % 2}
                 for i in range(12)]  # fmt: skip
    toy = replace(TOY, initializer_range=0.3)
    make_run(folder / "runs", models=("pretrain", "sft"), toy=toy, questions=questions)
    save_ours(folder / "hf")
    save_qwen(folder / "qwen")
    return folder


def ask(capsys: pytest.CaptureFixture, place: Path, *arguments: str, code: int = 0) -> str:
    assert main(["eval", *arguments, "--output-dir", str(place / "runs")]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def written(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_runs_own_questions_give_the_accuracy_of_training(
    capsys: pytest.CaptureFixture, place: Path, tmp_path: Path
) -> None:
    text = ask(capsys, place, "toy", *SHORT, "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"))
    assert "toy (sft)" in text and "heldout" in text
    run = place / "runs" / "toy"
    [data], [sft] = run.glob("data_prep-*"), run.glob("sft-*")
    tokenizer, questions = load_tokenizer(data / "tokenizer"), prepared_questions(data / "prompts" / "heldout.jsonl")
    prompts = [tokenizer.encode_prompt(q["prompt"]) for q in questions]
    written_by = Decoder(load_model(sft / "model").eval())
    expected = generate(written_by, prompts, max_new_tokens=8, eos_ids={tokenizer.eos_id}, temperature=0)
    texts = [completion_text(tokenizer, c.prompt, c.tokens, {tokenizer.eos_id}) for c in expected]
    right = are_right([(q["prompt"], text, q["answer"]) for q, text in zip(questions, texts, strict=True)])
    [task] = written(tmp_path / "r.json")["tasks"]
    answers = [answer for item in task["items"] for answer in item["answers"]]
    assert [a["completion"] for a in answers] == texts
    assert [a["correct"] for a in answers] == right
    figures = task["figures"]
    assert figures["accuracy"] == sum(right) / len(right)
    assert figures["interval"] == list(wilson_interval(sum(right), len(right)))
    assert figures["mean_tokens"] == sum(len(c.tokens) for c in expected) / len(expected)
    assert "<h2>heldout</h2>" in (tmp_path / "r.html").read_text()


def test_the_stage_is_the_last_finished_one_or_the_one_named(
    capsys: pytest.CaptureFixture, place: Path, tmp_path: Path
) -> None:
    for arguments, name in [((), "toy (sft)"), (("--stage", "pretrain"), "toy (pretrain)")]:
        ask(capsys, place, "toy", *arguments, *SHORT, "--limit", "2", "--json", str(tmp_path / "r.json"))
        assert written(tmp_path / "r.json")["model"]["name"] == name


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_stages_folder_is_its_model_with_its_runs_tokenizer(
    inside: str, capsys: pytest.CaptureFixture, place: Path, tmp_path: Path
) -> None:
    [sft] = (place / "runs" / "toy").glob("sft-*")
    ask(capsys, place, str(sft / inside), *SHORT, "--limit", "2", "--json", str(tmp_path / "a.json"))
    ask(capsys, place, "toy", *SHORT, "--limit", "2", "--json", str(tmp_path / "b.json"))
    a, b = written(tmp_path / "a.json"), written(tmp_path / "b.json")
    assert a["model"] == b["model"] and a["tasks"][0]["items"] == b["tasks"][0]["items"]


@pytest.mark.parametrize(("name", "form"), [("hf", "folder"), ("qwen", "transformers")])
def test_a_hugging_face_folder_is_asked(
    name: str, form: str, capsys: pytest.CaptureFixture, place: Path, tmp_path: Path
) -> None:
    path, choices = tmp_path / "r.json", tmp_path / "c.jsonl"
    choices.write_text('{"question": "two?", "choices": ["cat", "mat"], "answer": 1, "difficulty": 2}\n' * 3)
    names = f"arithmetic,choices:{choices},cloze:{choices}"
    arguments = ("--limit", "3", "--samples", "3", "--difficulty", "1-2", "--json", str(path))
    ask(capsys, place, str(place / name), "--tasks", names, *SHORT, *arguments)
    report = written(path)
    assert (report["model"]["form"], report["settings"]["temperature"]) == (form, 0.6)
    arithmetic, letters, texts = report["tasks"]
    assert len(arithmetic["items"]) == 3 and {len(item["answers"]) for item in arithmetic["items"]} == {3}
    assert {item["difficulty"] for item in arithmetic["items"]} <= {1, 2}
    assert set(arithmetic["figures"]["pass_at_k"]) == {"1", "2", "3"}
    assert letters["items"][0]["answers"][0]["completion"] in "AB"
    assert texts["items"][0]["answers"][0]["completion"] in ("cat", "mat")


def test_an_export_answers_its_runs_questions_as_its_stage_does(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "runs", models=("sft",), toy=replace(TOY, initializer_range=0.3))
    [data], [sft] = run_dir.glob("data_prep-*"), run_dir.glob("sft-*")
    model, path = load_model(sft / "model"), tmp_path / "r.json"

    def fill(export: Path) -> None:
        with atomic_folder(export / "hf") as aside:
            save_hf(
                aside, model.config, model.state_dict(), tokenizer_folder=data / "tokenizer", dtype=torch.float32,
                model_card="", generation={},
            )  # fmt: skip

    folder = finish(run_dir, "export", fill=fill)
    found = {}
    for target in (["toy"], ["toy", "--stage", "export"], [str(folder)], [str(folder / "hf")]):
        ask(capsys, tmp_path, *target, *SHORT, "--json", str(path))
        found[written(path)["model"]["name"]] = written(path)["tasks"][0]["items"]
    assert set(found) == {"toy (sft)", "toy (export)", "toy (hf)"}
    assert found["toy (sft)"] == found["toy (export)"] == found["toy (hf)"]


def test_an_evaluation_is_a_function_of_its_seed(capsys: pytest.CaptureFixture, place: Path, tmp_path: Path) -> None:
    found = []
    for seed, batch in (("1", "256"), ("1", "3"), ("2", "256")):
        arguments = ("--samples", "2", "--limit", "4", "--seed", seed, "--max-batch", batch, *SHORT)
        ask(capsys, place, str(place / "hf"), "--tasks", "logic", *arguments, "--json", str(tmp_path / "r.json"))
        found.append(written(tmp_path / "r.json")["tasks"][0]["items"])
    assert found[0] == found[1] != found[2]


def test_two_models_are_compared_on_the_same_questions(
    capsys: pytest.CaptureFixture, place: Path, tmp_path: Path
) -> None:
    a, b = (str(tmp_path / f"{name}.json") for name in "ab")
    tasks = ("--tasks", "heldout,arithmetic", "--limit", "5", *SHORT)
    text = ask(capsys, place, "toy", *tasks, "--compare", str(place / "hf"), "--json", a)
    assert "against hf" in text and "McNemar" in text
    once = written(Path(a))["comparison"]
    assert (
        set(once["tasks"]) == {"heldout", "arithmetic", "all tasks"} and once["tasks"]["all tasks"]["questions"] == 10
    )
    # The same by two evaluations: from a report, and from two.
    [heldout] = (place / "runs" / "toy").glob("data_prep-*/prompts/heldout.jsonl")
    ask(capsys, place, str(place / "hf"), "--tasks", f"heldout:{heldout},arithmetic", *tasks[2:], "--json", b)
    ask(capsys, place, "toy", *tasks, "--compare", b, "--json", str(tmp_path / "c.json"))
    assert written(tmp_path / "c.json")["comparison"]["tasks"] == once["tasks"]
    ask(capsys, place, a, "--compare", b, "--json", str(tmp_path / "d.json"))
    assert written(tmp_path / "d.json")["comparison"]["tasks"] == once["tasks"]
    ask(capsys, place, a, "--tasks", "arithmetic", "--compare", b, "--json", str(tmp_path / "e.json"))
    assert set(written(tmp_path / "e.json")["comparison"]["tasks"]) == {"arithmetic"}
    assert "differs at question" in ask(capsys, place, "toy", *tasks, "--seed", "9", "--compare", b, code=2)
    assert "4 questions here and 5 there" in ask(capsys, place, "toy", *tasks, "--limit", "4", "--compare", b, code=2)
    for option in (("--samples", "2"), ("--limit", "3"), ("--stage", "sft"), ("--k", "1")):
        assert f"{option[0]}: {a} is a report" in ask(capsys, place, a, *option, code=2)
    assert "holds only heldout, arithmetic" in ask(capsys, place, a, "--tasks", "logic", code=2)
    assert "has to be a report (.json) too" in ask(capsys, place, a, "--compare", "toy", code=2)


def test_the_tasks_are_listed(capsys: pytest.CaptureFixture, place: Path) -> None:
    text = ask(capsys, place, "--list")
    assert "arithmetic" in text and "gsm8k:PATH" in text and "lm_eval:TASK|FILE.yaml" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "name what to evaluate"),
        (("tou",), 'did you mean "toy"'),
        (("toy", "--tasks", "arithmetics"), 'did you mean "arithmetic"'),
        (("toy", "--tasks", ","), "name at least one task"),
        (("toy", "--samples", "0"), "--samples 0: a question needs at least one answer"),
        (("toy", "--samples", "3", "--temperature", "0"), "are all the same"),
        (("toy", "--temperature", "nan"), "must be a finite number"),
        (("toy", "--k", "2"), "--k 2: must be from 1 to the number of samples, 1. Use --samples 2."),
        (("toy", "--k", "0"), "--k 0: must be"),
        (("toy", "--k", "one"), "must be whole numbers"),
        (("toy", "--difficulty", "3-1"), "--difficulty 3-1: must be a level"),
        (("toy", "--difficulty", "7"), "--difficulty 7: must be a level"),
        (("toy", "--difficulty", "4"), "are of difficulty 1, 2"),
        (("toy", "--stage", "grpo"), "has not finished it (finished are pretrain, sft)"),
        (("toy", "--stage", "sftt"), 'did you mean "sft"'),
        (("toy", "--tools", "calculatr"), 'did you mean "calculator"'),
        (("toy", "--tools", "calculator"), "is no token of this tokenizer"),
        (("toy", "--report", "json"), "write it as NAME=FILE"),
        (("toy", "--report", "jso=x"), 'did you mean "json"'),
        (("toy", "--json", "."), "is a folder, or lies in a file"),
        (("toy", "--json", "x.json", "--report", "json=x.json"), "two reports would be written to this file"),
        (("toy", "--compare", "tou"), 'did you mean "toy"'),
        (("toy", "--compare", "missing.json"), "neither a run in"),
        (("toy", "--tasks", "gsm8k:missing.jsonl"), "missing.jsonl: no such file"),
        (("toy", "--limit", "0"), "not in the range"),
    ],
)
def test_what_cannot_be_done_is_told_before_a_model_is_loaded(
    arguments: tuple[str, ...],
    expected: str,
    capsys: pytest.CaptureFixture,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray_pipeline.evaluation.models.load", None)
    assert expected in ask(capsys, place, *arguments, code=2)


def test_folders_without_a_model_are_refused(capsys: pytest.CaptureFixture, place: Path, tmp_path: Path) -> None:
    assert "holds no model" in ask(capsys, place, str(tmp_path), "--tasks", "logic", code=2)
    assert "name at least one task" in ask(capsys, place, str(place / "hf"), code=2)
    assert "the model is not of a run" in ask(capsys, place, str(place / "hf"), "--tasks", "heldout", code=2)
    hf = str(place / "hf")
    assert "--stage sft: " in ask(capsys, place, hf, "--tasks", "logic", "--stage", "sft", code=2)
    qwen = (str(place / "qwen"), "--tasks", "logic", "--tools", "calculator")
    assert "tools are for models of our own decoder" in ask(capsys, place, *qwen, code=2)


def test_a_run_without_a_finished_stage_is_refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", models=())
    assert "has to be finished first" in ask(capsys, tmp_path, "toy", code=2)
    [data] = run.glob("data_prep-*")
    assert "makes no model" in ask(capsys, tmp_path, str(data), code=2)
    record = read_record(data)
    assert record is not None
    write_record(data, replace(record, status="running"))
    assert "the stage is not finished (its record is running)" in ask(capsys, tmp_path, str(data), code=2)


def test_a_damaged_model_is_named(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", models=("sft",))
    [weights] = run.glob("sft-*/model/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert str(weights) in ask(capsys, tmp_path, "toy", code=2)


def test_an_evaluation_is_a_run_of_its_runs_group_in_the_trackers(
    capsys: pytest.CaptureFixture, place: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "toy"
    shutil.copytree(place / "runs" / "toy", run_dir)
    config = load_config(None, {"run_name": "toy", "tracking.wandb": False, "tracking.tensorboard": True})
    (run_dir / "config.yaml").write_text(with_checksum(config_yaml(config)))
    report = tmp_path / "r.json"
    asked = ["eval", "toy", *SHORT, "--json", str(report), "--output-dir", str(tmp_path)]
    assert main([*asked, "--no-tracking"]) == 0
    assert not (run_dir / "evaluations").exists()
    assert main(asked) == 0
    assert "Tracked as toy-eval-sft-" in capsys.readouterr().err
    [folder] = (run_dir / "evaluations").iterdir()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    [task] = written(report)["tasks"]
    [found] = events.Scalars("val/heldout/accuracy")
    assert found.value == pytest.approx(task["figures"]["accuracy"])
    assert events.Scalars("val/heldout/pass_at_1")[0].value == pytest.approx(task["figures"]["accuracy"])
    [shown] = [item for item in read_samples(folder) if item["prompt"] == task["items"][0]["prompt"]]
    assert shown["completion"] == task["items"][0]["answers"][0]["completion"]
    assert main(["status", "toy", "--output-dir", str(tmp_path)]) == 0, "the folder is none of a stage"


def test_a_model_of_no_run_is_told_to_no_tracker(capsys: pytest.CaptureFixture, place: Path) -> None:
    assert track_evaluation(Report({"folder": str(place / "hf")}, {}, [], 0.0)) is None

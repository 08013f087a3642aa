"""The verbs that read a finished run: status, generate, inspect-batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.cli.generate import Printer
from ray_pipeline.cli.runs import find_run, latest_run, list_runs
from ray_pipeline.config_load import load_config
from ray_pipeline.data.inspect import render_rows
from ray_pipeline.data.loader import PackedRows
from ray_pipeline.data.tokenizer import load_tokenizer
from ray_pipeline.errors import UserError
from tests.cli.made_run import CHAT, SEQ_LEN, make_run


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder)
    return folder


def ask(capsys: pytest.CaptureFixture, output_dir: Path, *arguments: str, code: int = 0) -> str:
    assert main([*arguments, "--output-dir", str(output_dir)]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_status_shows_stages_figures_baselines_and_folders(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    text = ask(capsys, output_dir, "status", "toy")
    assert "validation_loss 1.25" in text and "ln_vocab 6" in text and "1 min 15 s" in text and "abababababab" in text
    assert text.count("pending") == 3
    assert str(output_dir / "toy") in text.replace("\n", "")


def test_status_without_a_run_is_the_latest_and_json_is_complete(
    capsys: pytest.CaptureFixture, output_dir: Path
) -> None:
    facts = json.loads(ask(capsys, output_dir, "status", "--json"))
    assert facts["run"] == "toy"
    done = [stage["stage"] for stage in facts["stages"] if stage["status"] == "done"]
    assert done == ["data_prep", "pretrain", "sft"]
    assert latest_run(output_dir) == output_dir / "toy"


def test_a_run_is_found_by_name_or_path(output_dir: Path, tmp_path: Path) -> None:
    assert find_run("toy", output_dir) == find_run(str(output_dir / "toy"), tmp_path) == output_dir / "toy"
    assert [run.name for run in list_runs(output_dir)] == ["toy"]
    with pytest.raises(UserError, match="no runs in"):
        latest_run(tmp_path)
    with pytest.raises(UserError, match="not found"):
        find_run("", output_dir)


def test_generate_is_deterministic_and_raw_text_starts_with_the_prompt(
    capsys: pytest.CaptureFixture, output_dir: Path
) -> None:
    arguments = ("generate", "toy", "the cat", "--stage", "pretrain", "--max-new-tokens", "12", "--seed", "3")
    first, second = (ask(capsys, output_dir, *arguments) for _ in range(2))
    assert first == second
    assert first.startswith("the cat") and len(first) > len("the cat\n")
    assert ask(capsys, output_dir, *arguments[:-1], "4") != first


def test_generate_answers_by_chat_after_sft(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    chat = ask(capsys, output_dir, "generate", "toy", "the cat", "--chat", "--max-new-tokens", "5")
    assert not chat.startswith("the cat")
    assert ask(capsys, output_dir, "generate", "toy", "the cat", "--raw", "--max-new-tokens", "5").startswith("the cat")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "toy", ""], "PROMPT is empty"),
        (["generate", "toy", "a", "--stage", "sftt"], 'did you mean "sft"'),
        (["generate", "toy", "a", "--stage", "grpo"], "has not finished it (finished are pretrain, sft)"),
        (["generate", "toy", "a " * 200], "the model reads 128, answer included"),
        (["generate", "toy", "a", "--top-p", "0"], "not in the range"),
        (["inspect-batch", "toy", "--stage", "sf"], 'did you mean "sft"'),
    ],
)
def test_what_cannot_be_read_is_told(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture, output_dir: Path
) -> None:
    assert expected in ask(capsys, output_dir, *arguments, code=2)


def test_generate_needs_a_finished_stage(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    make_run(tmp_path, models=())
    assert "pretrain has to be finished first" in ask(capsys, tmp_path, "generate", "toy", "a", code=2)


def test_damaged_weights_are_named(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, models=("pretrain",))
    weights = next(run_dir.glob("pretrain-*/model/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert str(weights) in ask(capsys, tmp_path, "generate", "toy", "a", code=2)


def test_streamed_text_is_the_decoded_text(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    tokenizer = load_tokenizer(next(output_dir.glob("toy/data_prep-*/tokenizer")))
    tokens = tokenizer.encode("naïve — «日本» 🙂 end")
    printer = Printer(tokenizer, [])
    for token in tokens:
        printer.add(token)
        assert "\ufffd" not in capsys.readouterr().out
    broken = tokens[:-8]  # may end inside a character
    printer = Printer(tokenizer, [])
    for token in broken:
        printer.add(token)
    printer.finish()
    assert capsys.readouterr().out == tokenizer.decode(broken) + "\n"


@pytest.mark.parametrize("stage", ["pretrain", "sft", "distillation"])
def test_inspect_batch_shows_what_is_trained_on(stage: str, capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    text = ask(capsys, output_dir, "inspect-batch", "toy", "--stage", stage, "--rows", "1")
    assert "row 0" in text and f"of {SEQ_LEN} targets" in text and "row 1" not in text
    assert "│\n" in text, "document boundaries"
    if stage == "pretrain":
        assert "«" in text
    else:
        assert "«<think>2+2=4</think>4<｜end▁of▁sentence｜>»" in text
        assert "<｜User｜>What is 2+2?<｜Assistant｜>«" in text
    assert ask(capsys, output_dir, "inspect-batch", "toy", "--stage", stage, "--validation").count("row ") == 2


def test_inspect_batch_shows_the_rows_of_the_step(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    data = next(output_dir.glob("toy/data_prep-*"))
    rows = load_config().pretrain.batch_size
    batch = PackedRows(data / "pretrain" / "train").batch(0, 3, rows).rows(0, 2)
    plain = [text.plain for text in render_rows(batch, load_tokenizer(data / "tokenizer"))]
    shown = ask(capsys, output_dir, "inspect-batch", "toy", "--stage", "pretrain", "--step", "3")
    assert shown.replace("«", "").replace("»", "").startswith("\n".join(plain))
    assert shown != ask(capsys, output_dir, "inspect-batch", "toy", "--stage", "pretrain", "--step", "4")


def test_inspect_batch_shows_grpo_questions(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    text = ask(capsys, output_dir, "inspect-batch", "toy", "--stage", "grpo")
    assert CHAT[0]["content"] in text and "answer 4" in text and "2 of 3 questions" in text

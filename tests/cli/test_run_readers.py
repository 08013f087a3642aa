"""The verbs that read a finished run: status, generate, inspect-batch."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ray_pipeline.cli import main
from ray_pipeline.cli.generate import Printer, prompt_tokens
from ray_pipeline.cli.runs import find_run, latest_run, list_runs
from ray_pipeline.dag.ledger import RunFile, read_record
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.rows.inspect import render_rows
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import load_model, save_model
from ray_pipeline.settings.loading import load_config
from tests.cli.made_run import CHAT, SEQ_LEN, TOY, make_run
from tests.evaluation.made_models import save_qwen


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
    record = read_record(next(output_dir.glob("toy/sft-*")))
    assert record is not None and record.weights_digest is not None
    assert "validation_loss 1.25" in text and "ln_vocab 6" in text and record.weights_digest[:12] in text
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


def test_generate_takes_every_form_of_a_model(capsys: pytest.CaptureFixture, output_dir: Path, tmp_path: Path) -> None:
    answer = ask(capsys, output_dir, "generate", "toy", "the cat", "--chat", "--max-new-tokens", "5")
    assert ask(capsys, output_dir, "generate", "toy:sft", "the cat", "--max-new-tokens", "5") == answer
    (folder,) = output_dir.glob("toy/sft-*")
    assert ask(capsys, tmp_path, "generate", str(folder), "the cat", "--max-new-tokens", "5") == answer
    text = ask(capsys, output_dir, "generate", "toy:sft", "the cat", "--raw", "--max-new-tokens", "5")
    ask(capsys, output_dir, "convert", "toy:sft", str(tmp_path / "own"), "--to", "checkpoint")
    own = ("generate", str(tmp_path / "own"), "the cat", "--max-new-tokens", "5")
    assert ask(capsys, tmp_path, *own) == answer
    assert ask(capsys, tmp_path, *own, "--raw", "--temperature", "0.8") == text
    message = ask(capsys, tmp_path, "generate", str(save_qwen(tmp_path / "qwen")), "the cat", code=2)
    assert "its architecture is none of ours, which `generate` runs. Use `chat`." in message


def test_generate_answers_where_nothing_was_pretrained(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, models=("sft", "dpo"))
    run = RunFile(run_dir)
    run.chain = ["data_prep", "sft", "dpo"]
    run.save()
    arguments = ("generate", "toy", "What is 2+2?", "--max-new-tokens", "5")
    shown = ask(capsys, tmp_path, *arguments)
    assert not shown.startswith("What is") and shown == ask(capsys, tmp_path, *arguments, "--stage", "dpo")
    status = ask(capsys, tmp_path, "status", "toy")
    assert "dpo" in status and "pretrain" not in status and "grpo" not in status


RAW = ("generate", "toy", "the cat", "--stage", "pretrain", "--max-new-tokens", "30", "--temperature", "0")


def test_generate_drafts_with_the_mtp_modules(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    plain = ask(capsys, output_dir, *RAW)
    assert main([*RAW, "--speculative", "--output-dir", str(output_dir)]) == 0
    captured = capsys.readouterr()
    assert captured.out == plain
    assert re.fullmatch(r"\d+ of \d+ drafted tokens accepted( \(\d+%\))?\n", captured.err)


def test_generate_stops_before_a_stop_string(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    written = ask(capsys, output_dir, *RAW).removeprefix("the cat").removesuffix("\n")
    stop = written[5:8]
    short = ask(capsys, output_dir, *RAW, "--stop", "\0never\0", "--stop", stop)
    assert short == "the cat" + written[: written.index(stop)] + "\n"


def test_generate_searches_with_beams(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    beams = ask(capsys, output_dir, *RAW, "--num-beams", "3", "--length-penalty", "0.5")
    assert beams.startswith("the cat") and beams.endswith("\n") and len(beams) > len("the cat\n")
    assert beams == ask(capsys, output_dir, *RAW[:-2], "--num-beams", "3", "--length-penalty", "0.5")


def test_generate_ends_thinking_when_the_budget_is_spent(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    arguments = ("generate", "toy", "owl <think>", *RAW[3:], "--think-budget", "2")
    tokenizer = load_tokenizer(next(output_dir.glob("toy/data_prep-*/tokenizer")))
    text = ask(capsys, output_dir, *arguments)
    thought = text.removeprefix("owl <think>").split("</think>")[0]
    free = ask(capsys, output_dir, *arguments[:-2])
    assert "</think>" in text and free.startswith("owl <think>" + thought)
    assert len(tokenizer.encode(thought)) <= 2


def test_generate_draws_by_every_setting(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    arguments = (*RAW[:-1], "1.5")
    free = ask(capsys, output_dir, *arguments)
    assert ask(capsys, output_dir, *arguments, "--top-k", "1") == ask(capsys, output_dir, *RAW)
    assert ask(capsys, output_dir, *arguments, "--min-p", "1") == ask(capsys, output_dir, *RAW)
    assert ask(capsys, output_dir, *arguments, "--top-p", "0.000001") == ask(capsys, output_dir, *RAW)
    assert ask(capsys, output_dir, *arguments, "--repetition-penalty", "9") != free


def test_generate_needs_mtp_modules_to_draft(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    make_run(tmp_path, models=("pretrain",), toy=replace(TOY, num_nextn_predict_layers=0))
    message = ask(capsys, tmp_path, "generate", "toy", "a", "--speculative", code=2)
    assert "has num_nextn_predict_layers=0, no MTP module to draft with. Leave it out." in message


def test_generate_needs_a_tokenizer_of_the_model(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    make_run(tmp_path, models=("pretrain",), toy=replace(TOY, vocab_size=20))
    message = ask(capsys, tmp_path, "generate", "toy", "the cat", code=2)
    assert "does not belong to" in message and "model's vocabulary has 20." in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "toy", ""], "PROMPT is empty"),
        (["generate", "toy", "a", "--stop", ""], '--stop "": an empty text is part of every answer'),
        (["generate", "toy", "a", "--length-penalty", "2"], "--length-penalty 2 ranks the answers of a beam search"),
        *(
            (["generate", "toy", "a", "--num-beams", "2", *option], f"--num-beams 2 cannot be combined with {named}: ")
            for option, named in [
                (["--temperature", "0.5"], "--temperature 0.5"),
                (["--top-k", "3"], "--top-k 3"),
                (["--top-p", "0.5"], "--top-p 0.5"),
                (["--min-p", "0.1"], "--min-p 0.1"),
                (["--repetition-penalty", "2"], "--repetition-penalty 2"),
                (["--stop", "x"], "--stop"),
                (["--think-budget", "0"], "--think-budget 0"),
                (["--speculative"], "--speculative"),
            ]
        ),
        (["generate", "toy", "a", "--chat", "--top-p", "0.5"], "--top-p 0.5 changes nothing at temperature 0"),
        (["generate", "toy", "a", "--chat", "--top-k", "5"], "--top-k 5 changes nothing at temperature 0"),
        (["generate", "toy", "a", "--temperature", "0", "--min-p", "0.5"], "--min-p 0.5 changes nothing"),
        (["generate", "toy", "a", "--temperature", "inf"], "--temperature inf: must be a finite number."),
        (["generate", "toy", "a", "--repetition-penalty", "nan"], "--repetition-penalty nan: must be a finite number."),
        (["generate", "toy", "a", "--top-k", "-1"], "not in the range"),
        (["generate", "toy", "a", "--min-p", "2"], "not in the range"),
        (["generate", "toy", "a", "--repetition-penalty", "0"], "not in the range"),
        (["generate", "toy", "a", "--think-budget", "-1"], "not in the range"),
        (["generate", "toy", "a", "--num-beams", "0"], "not in the range"),
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


def spoiled_run(folder: Path) -> Path:
    """A run whose model's weights are no numbers."""
    run_dir = make_run(folder, models=("pretrain",))
    model = next(run_dir.glob("pretrain-*")) / "model"
    state = load_model(model).state_dict()
    save_model(model, TOY, {name: torch.full_like(tensor, math.nan) for name, tensor in state.items()})
    return model


WAYS = {"drawn": (), "greedy": ("--temperature", "0"), "beams": ("--num-beams", "2"), "mtp": ("--speculative",)}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_model_whose_logits_are_no_numbers_is_named(capsys: pytest.CaptureFixture, tmp_path: Path, options) -> None:
    model = spoiled_run(tmp_path)
    said = ask(capsys, tmp_path, "generate", "toy", "the cat", *options, code=2)
    assert f"the model in {model} cannot write: the logits of the next token are not finite numbers" in said
    assert "Traceback" not in said


def test_a_model_whose_logits_are_no_numbers_is_not_evaluated(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    spoiled_run(tmp_path)
    said = ask(capsys, tmp_path, "eval", "toy", "--stage", "pretrain", code=2)
    assert "cannot write: the logits of the next token are not finite numbers" in said


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


def test_raw_text_begins_as_the_model_has_seen_it(tmp_path: Path) -> None:
    tokenizer = save_trained(train_bpe(["What is 12?"] * 20, 320), tmp_path)
    plain = tokenizer.encode("What")
    assert prompt_tokens(tokenizer, "What", raw=True, begins=True) == [tokenizer.bos_id, *plain]
    assert prompt_tokens(tokenizer, "What", raw=True, begins=False) == plain
    assert prompt_tokens(tokenizer, "What", raw=False, begins=False) == tokenizer.encode_prompt("What")

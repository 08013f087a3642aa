"""`inspect-batch` of pairs, tool conversations and puzzles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.cli import main
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.forms.preference_records import as_preference
from ray_pipeline.data.rows.manifest import write_data_manifest
from ray_pipeline.data.rows.preferences import write_preferences
from ray_pipeline.data.tasks.question import Question
from ray_pipeline.records.artifacts import write_text
from ray_pipeline.settings.loading import load_config
from tests.cli.made_run import SEQ_LEN, make_run

EOS = "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    make_run(path, models=())
    return path


def ask(capsys: pytest.CaptureFixture, output_dir: Path, *arguments: str) -> tuple[int, str, str]:
    code = main(["inspect-batch", "toy", *arguments, "--output-dir", str(output_dir)])
    return code, *capsys.readouterr()


def test_pairs_show_the_question_and_both_answers(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    code, _, error = ask(capsys, output_dir, "--stage", "dpo")
    assert code == 2 and "the run prepared no preferences, as dpo is not among its stages" in error
    data = next(output_dir.glob("toy/data_prep-*"))
    config = load_config(None, {"data.seq_len": SEQ_LEN})
    records = [{"prompt": f"the {n}?", "chosen": f"<think>{n}</think>yes", "rejected": "no"} for n in range(10)]
    pairs = [as_preference(record) for record in records]
    write_preferences(config, pairs, load_tokenizer(data / "tokenizer"), data / "preferences", lambda *_: None)
    code, text, _ = ask(capsys, output_dir, "--stage", "dpo", "--rows", "2")
    assert code == 0 and "pair 0:" in text and "pair 1:" in text and "pair 2:" not in text
    shown = [n for n in range(10) if f"<｜User｜>the {n}?<｜Assistant｜>" in text]
    assert len(shown) == 2
    assert all(f"chosen: «<think>{n}</think>yes{EOS}»\nrejected: «no{EOS}»" in text for n in shown)
    held = ask(capsys, output_dir, "--stage", "dpo", "--validation", "--rows", "9")[1]
    assert held.count("chosen:") == 2 and not any(f"the {n}?" in held for n in shown)


def test_a_puzzles_reference_is_cut_short(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    path = next(output_dir.glob("toy/data_prep-*")) / "prompts" / "train.jsonl"
    entry = json.dumps({"question": "?", "metadata": "x" * 500})
    write_text(path, json.dumps({"prompt": "?", "answer": entry, "category": "puzzle", "difficulty": 0}) + "\n")
    write_data_manifest(path.parent.parent, {})
    _, text, _ = ask(capsys, output_dir, "--stage", "grpo")
    assert f"answer {entry[:100]}..., puzzle" in text and entry not in text


def test_a_question_may_hold_other_line_ends(capsys: pytest.CaptureFixture, output_dir: Path) -> None:
    path = next(output_dir.glob("toy/data_prep-*")) / "prompts" / "train.jsonl"
    question = Question("one\u2028two\x85three\u2029?", "", "3", "sum", 1)
    write_text(path, 2 * (json.dumps(question.record(), ensure_ascii=False) + "\n"))
    write_data_manifest(path.parent.parent, {})
    code, text, _ = ask(capsys, output_dir, "--stage", "grpo", "--rows", "1")
    assert code == 0 and question.prompt in text and "1 of 2 questions" in text

"""Talking to a run's model: through pipes, and in a pseudo-terminal as a person does."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

from ray_pipeline.cli import main
from ray_pipeline.cli.chat_screen import Screen
from ray_pipeline.cli.eval_target import find_model
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.conversation import Conversation
from ray_pipeline.evaluation.models import load
from tests.cli.made_run import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder)
    return folder


def talk(runs: Path, **options) -> Conversation:
    return Conversation(load(find_model("toy:sft", None, runs)), **{"max_new_tokens": 12, **options})


def test_an_answer_is_what_generation_writes_and_the_next_goes_on_from_it(runs):
    chat, pieces = talk(runs), []
    first = chat.send("What is 2+2?", pieces.append)
    model = chat.model
    prompt = model.prompt("What is 2+2?")
    [written] = model.backend.generate(
        [prompt], max_new_tokens=12, temperature=0.0, seeds=[0], eos_ids=model.eos_ids
    )  # fmt: skip
    assert "".join(pieces) == first.text == model.text(prompt, written.tokens)
    assert first.notes == [] if written.finished else first.notes[0].startswith("Cut: 12 tokens")
    chat.send("And 3+3?", pieces.append)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1]["content"] == first.text


def test_help_lists_the_commands_and_what_the_model_was_trained_for(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n"))
    assert main(["chat", "toy:sft", "--output-dir", str(runs)]) == 0
    said = capsys.readouterr()
    listed = (said.out + said.err).partition("trained for questions like these:")[2].split("\n")[1:]
    [path] = runs.glob("toy/data_prep-*/prompts/heldout.jsonl")
    questions = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = {question["category"] for question in questions}
    assert {line.split()[0] for line in listed if line.strip()} == kinds
    assert all(any(q["prompt"] in line for q in questions) for line in listed if line.strip())


def test_a_retry_draws_with_the_next_seed_and_replaces_the_answer(runs):
    chat = talk(runs, temperature=1.5)
    first = chat.send("What is 2+2?", lambda _: None).text
    again = chat.retry(lambda _: None).text
    assert again != first and [m["content"] for m in chat.messages] == ["What is 2+2?", again]
    same = talk(runs, temperature=1.5, seed=1)
    assert same.send("What is 2+2?", lambda _: None).text == again


def test_a_conversation_is_as_it_was_when_no_answer_comes(runs):
    chat = talk(runs)
    chat.send("What is 2+2?", lambda _: None)
    before = list(chat.messages)
    with pytest.raises(UserError, match="tokens long: the model reads 128"):
        chat.send("word " * 200, lambda _: None)
    assert chat.messages == before
    for parameter in chat.model.backend.model.parameters():
        parameter.fill_(math.nan)
    for again in (lambda: chat.send("And 3+3?", lambda _: None), lambda: chat.retry(lambda _: None)):
        with pytest.raises(UserError, match="toy \\(sft\\)"):
            again()
        assert chat.messages == before


def test_old_messages_are_left_out_and_it_is_said(runs):
    chat = talk(runs)
    for _ in range(12):
        reply = chat.send("What is the sum of two and two?", lambda _: None)
        if any("were not read" in note for note in reply.notes):
            break
    else:
        raise AssertionError("the context of 128 tokens never overflowed")
    assert len(chat._prompt()[0]) < 128


def test_a_conversation_is_driven_through_a_pipe(runs, monkeypatch, capsys, tmp_path):
    saved = tmp_path / "talk.jsonl"
    lines = [
        "/retry", "What is 2+2?", "/system Be brief.", "/temp 0.7", "/temp hot", "/what", "word " * 200, "/think",
        f"/save {saved}", f"/save {saved}", "/save", "/clear", "/quit", "never read",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "toy:sft", "--output-dir", str(runs), "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    for said in (
        "toy (sft): ", "nothing was asked yet", "The system prompt is set.", "The temperature is 0.7.",
        "/temp hot: must be a number", "/what: no such command", "tokens long: the model reads 128",
        "Thinking is hidden.", "Saved to", "there is such a file already", "/save: to which file?",
        "A new conversation.",
    ):  # fmt: skip
        assert said in out, said
    record = json.loads(saved.read_text())
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]


def test_thinking_is_shown_or_counted(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for hidden, expected in (
        (False, "<think>two and two</think>4\n"),
        (True, "(thought for 3 words; /think shows them)\n4\n"),
    ):
        screen = Screen(hide_thinking=hidden)
        with screen.answering() as show:
            for piece in ("<thi", "nk>two ", "and two</th", "ink>4"):
                show(piece)
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "neither a run"),
        (["toy:grpo"], "has not finished it"),
        (["toy:sft", "--stage", "pretrain"], "two stages"),
        (["toy", "--temperature", "nan"], "temperature"),
    ],
)
def test_what_cannot_be_talked_to_is_refused(runs, capsys, arguments, said):
    assert main(["chat", *arguments, "--output-dir", str(runs)]) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(runs, monkeypatch, capsys, tmp_path):
    answering, pieces = Screen.answering, []

    @contextmanager
    def interrupted(screen):
        with answering(screen) as show:

            def shown(piece: str) -> None:
                show(piece)
                pieces.append(piece)
                if len(pieces) == 2:
                    signal.raise_signal(signal.SIGINT)

            yield shown

    monkeypatch.setattr(Screen, "answering", interrupted)
    lines = ["What is 2+2?", f"/save {tmp_path / 'first'}", "/retry", f"/save {tmp_path / 'second'}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "toy:sft", "--output-dir", str(runs), "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.count("Stopped.") == 1
    first, second = (json.loads((tmp_path / name).read_text())["messages"][1] for name in ("first", "second"))
    assert first["content"] == "".join(pieces[:2]) and second["content"] == "".join(pieces[2:]) != ""


def test_in_a_terminal_ctrl_c_says_how_to_end_and_ctrl_d_ends_the_chat(runs):
    child = pexpect.spawn(
        sys.executable,
        ["-m", "ray_pipeline.cli", "chat", "toy:sft", "--output-dir", str(runs), "--max-new-tokens", "100"],
        env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PROMPT_TOOLKIT_NO_CPR": "1"},
        timeout=120,
        encoding="utf-8",
    )
    ready = r"\x1b\[\?2004h[\s\S]*?\x1b\[\?25h"  # a new prompt has come and its cursor is shown
    child.expect("lists the commands")
    child.expect(ready)
    child.send("What is 2+2?\r")
    child.expect(ready)
    child.send("\x03")
    child.expect("ends the chat")
    child.expect(ready)
    child.send("/help\r")
    child.expect("stops an answer")
    child.expect(ready)
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
